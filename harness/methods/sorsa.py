"""SORSA (Cao, 2024): the r largest components of W are trained as U·diag(S)·Vᵀ, U and V kept near orthonormal.

W = U_p·diag(S_p)·V_pᵀ + W_r: the first part is the adapter, the residual weight W_r is frozen. γ times the mean over
all U and V of ‖UᵀU − I‖_F, ‖VᵀV − I‖_F is added to the loss.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.adapters.orthogonality import orthogonality_errors
from harness.config import NonNegativeFloat, PositiveInt, Strict
from harness.decomposition.components import both_sides
from harness.methods.base import AdapterInit, Statistics
from harness.methods.singular_form import SingularFormMethod
from harness.models.targets import Layer

if TYPE_CHECKING:
    from peft import PeftModel


class SORSAOptions(Strict):
    """``gamma``: weight of the orthonormality penalty; the default is that of the reference's scripts."""

    rank: PositiveInt = 16
    gamma: NonNegativeFloat = 4e-4


class SORSA(SingularFormMethod):
    """PiSSA's components in SVD form, with a penalty that keeps them one."""

    Options = SORSAOptions
    decomposes = True
    summary = "SORSA: largest components of W in SVD form, kept near orthonormal"
    paper = "Cao, 2024 (arXiv 2409.00055)"

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """U_p, S_p and V_pᵀ of ``weight`` (out, in), which becomes the residual weight."""
        components = both_sides(weight, self.plain_svd(weight, rank, "first"), range(rank))
        U, S, Vt = (t.float().cpu().contiguous() for t in (components.U, components.sigma, components.V.T))
        report = {
            "solver": components.solver,
            "singular_value_max": float(S[0]),
            "singular_value_at_cut": float(S[-1]),
            "share_of_weight": float(components.sigma.norm() / weight.double().norm().clamp_min(1e-300)),
        }
        return AdapterInit(Vt, U, residual=True, report=report, extra={"lora_sigma.weight": S})

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """PEFT's LoRA layers with S."""
        from harness.adapters import singular

        attached: PeftModel = super().attach(model, ranks)
        singular.add_singular_values(attached)
        self._vectors = singular.singular_vectors(attached)
        return attached

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """γ · mean over all U and V of ‖UᵀU − I‖_F, ‖VᵀV − I‖_F."""
        if self.options.gamma == 0:
            return None
        return self.options.gamma * orthogonality_errors(*self._vectors).mean()
