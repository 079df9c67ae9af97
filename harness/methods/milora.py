"""MiLoRA (Wang et al., 2024): the r smallest singular components of the weight become the adapter.

W = U Σ Vᵀ; B₀ = U_m Σ_m^½ and A₀ = Σ_m^½ V_mᵀ of the smallest r components, and the base weight keeps the principal
ones, W − s·B₀A₀. The paper takes small components for noise and rare knowledge.
"""

from collections.abc import Mapping
from typing import Any

import torch

from harness.decomposition.plain_svd import balanced_factors, plain_svd
from harness.methods.base import AdapterInit, Statistics, moved_block
from harness.methods.lora import LoRA
from harness.models.targets import Layer


class MiLoRA(LoRA):
    """LoRA's options; float64 inside, fp32 out."""

    summary = "MiLoRA: adapter from the smallest singular components of W"
    paper = "Wang et al., 2024 (arXiv 2406.09044)"

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """B₀ and A₀ from the r smallest of the min(out, in) components of ``weight`` (out, in)."""
        components = min(weight.shape)
        decomposition = plain_svd(weight, components - rank)
        B, A = balanced_factors(weight, decomposition, slice(components - rank, components))
        report = {
            "solver": decomposition.solver,
            "gram_error_estimate": decomposition.gram_error,
            "singular_value_max": float(decomposition.sigma[0]),
            "singular_value_at_cut": float(decomposition.sigma[components - rank]),
        }
        return moved_block(weight, B, A, self.scaling(), report)
