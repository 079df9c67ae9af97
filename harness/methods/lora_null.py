"""LoRA-Null (Tang et al., 2025): the part of the weight that acts on the null space of inputs worth preserving.

With the bottom eigenvectors N (in, k) of the input covariance on data to preserve, W·N·Nᵀ is what W does in directions
that this data hardly uses. Its SVD gives B₀ = U_r Σ_r^½ and A₀ = Σ_r^½ V_rᵀ; the base weight becomes W − s·B₀A₀. Rows
of A₀ lie in the null space, so whatever B becomes while A stays as it is, outputs on the preserved inputs hardly move:
``freeze_a: true`` is the paper's v2, which trains B alone; v1 trains both.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import model_validator
from torch import nn

from harness.config import PositiveInt
from harness.decomposition.null_space import null_space
from harness.decomposition.plain_svd import balanced_factors, plain_svd, signs
from harness.errors import UserError
from harness.methods.base import AdapterInit, LowRank, Statistics, StatisticsRequest, moved_block
from harness.methods.lora import LoRA, LoRAOptions
from harness.models.targets import Layer


class LoRANullOptions(LoRAOptions):
    """``null_directions``: k, ``rank`` where it is not given. ``freeze_a``: A stays as initialised (v2)."""

    null_directions: PositiveInt | None = None
    freeze_a: bool = False

    @model_validator(mode="after")
    def _room_for_the_rank(self) -> "LoRANullOptions":
        if self.null_directions is not None and self.null_directions < self.rank:
            raise ValueError(f"null_directions of at least rank ({self.rank})")
        return self


class LoRANull(LoRA):
    """LoRA-Null v1, or v2 with ``freeze_a``."""

    Options = LoRANullOptions
    decomposes = True
    summary = "LoRA-Null: adapter in the null space of the inputs to preserve"
    paper = "Tang et al., 2025 (arXiv 2503.02659)"

    def statistics(self) -> StatisticsRequest:
        """Input covariances on what must be kept."""
        return StatisticsRequest(("input_covariance",), "preserve")

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """B₀ and A₀ from the SVD of ``weight`` (out, in) projected on the null space; float64 inside, fp32 out.

        Raises:
            UserError: there are fewer input channels than ``null_directions``.
        """
        assert statistics is not None, "LoRA-Null asks for statistics; the pipeline collects them"
        directions = self.options.null_directions or rank
        if directions > layer.in_features:
            raise UserError(
                f"method.null_directions: {directions} given; layer {layer.name} has {layer.in_features} input "
                f"channels, so at most {layer.in_features}"
            )
        covariance = statistics.input_covariance(layer.name)
        space = null_space(covariance.matrix.to(weight.device), directions)
        acting = weight.double() @ space.basis  # (out, k): W·N·Nᵀ has the SVD of W·N, with N·V for V
        decomposition = plain_svd(acting, rank, self.solver, "first")
        B, A = balanced_factors(acting, decomposition)
        A = A @ space.basis.T
        sign = signs(A.T)  # the basis may be turned by rounding: only in the channels' own coordinates is it fixed
        report = {
            "null_directions": space.basis.shape[1],
            "null_directions_exact": space.exact,
            "null_energy": space.energy,
            "covariance_tokens": covariance.tokens,
            "singular_value_max": decomposition.largest,
            "singular_value_at_cut": float(decomposition.sigma[-1]),
        }
        return moved_block(weight, B * sign, A * sign[:, None], self.scaling(), report)

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """PEFT LoRA, A frozen where the options say so."""
        from harness.adapters.lora import freeze_a

        model = super().attach(model, ranks)
        if self.options.freeze_a:
            freeze_a(model)
        return model

    def delta(self, trained: LowRank, initial: LowRank | None) -> LowRank:
        """With A frozen the update is s·(B − B₀)·A₀, of rank r and not 2r."""
        if self.options.freeze_a and initial is not None:
            return LowRank(trained.B - initial.B, trained.A, trained.scaling)
        return super().delta(trained, initial)
