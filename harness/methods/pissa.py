"""PiSSA (Meng et al., 2024): the r largest singular components of the weight become the adapter.

W = U Σ Vᵀ; B₀ = U_r Σ_r^½ and A₀ = Σ_r^½ V_rᵀ of the largest r components, and the base weight becomes the residual
weight W − s·B₀A₀.
"""

from collections.abc import Mapping
from typing import Any

import torch

from harness.decomposition.plain_svd import balanced_factors, plain_svd
from harness.methods.base import AdapterInit, Statistics, moved_block
from harness.methods.lora import LoRA
from harness.models.targets import Layer


class PiSSA(LoRA):
    """LoRA's options; float64 inside, fp32 out."""

    summary = "PiSSA: adapter from the largest singular components of W"
    paper = "Meng et al., 2024 (arXiv 2404.02948)"

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """B₀ and A₀ from the r largest components of ``weight`` (out, in)."""
        decomposition = plain_svd(weight, rank)
        B, A = balanced_factors(weight, decomposition, slice(0, rank))
        report = {
            "solver": decomposition.solver,
            "gram_error_estimate": decomposition.gram_error,
            "singular_value_max": float(decomposition.sigma[0]),
            "singular_value_at_cut": float(decomposition.sigma[rank - 1]),
        }
        return moved_block(weight, B, A, self.scaling(), report)
