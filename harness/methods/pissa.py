"""PiSSA (Meng et al., 2024): the r largest singular components of the weight become the adapter.

W = U Σ Vᵀ; B₀ = U_r Σ_r^½ and A₀ = Σ_r^½ V_rᵀ of the largest r components, and the base weight becomes the residual
weight W − s·B₀A₀.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from harness.decomposition.plain_svd import balanced_factors
from harness.methods.base import AdapterInit, Statistics, moved_block
from harness.methods.lora import LoRA
from harness.models.targets import Layer


class PiSSA(LoRA):
    """LoRA's options; float64 inside, fp32 out."""

    decomposes = True
    summary = "PiSSA: adapter from the largest singular components of W"
    paper = "Meng et al., 2024 (arXiv 2404.02948)"
    largest: ClassVar[bool] = True

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """B₀ and A₀ from r of the min(out, in) components of ``weight`` (out, in), at the end that the method takes."""
        components = min(weight.shape)
        cut = rank if self.largest else components - rank
        decomposition = self.plain_svd(weight, cut, "first" if self.largest else "rest")
        B, A = balanced_factors(weight, decomposition)
        report = {
            "solver": decomposition.solver,
            "gram_error_estimate": decomposition.gram_error,
            "singular_value_max": decomposition.largest,
            "singular_value_at_cut": float(decomposition.sigma[-1 if self.largest else 0]),
        }
        return moved_block(weight, B, A, self.scaling(), report)
