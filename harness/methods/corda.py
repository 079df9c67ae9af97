"""CorDA (Yang et al., NeurIPS 2024; CorDA++ §III-B, §V-A, §V-B): context-oriented initialisation of LoRA.

KPM (knowledge-preserved): covariances from data whose knowledge must stay; the r smallest components of W·C̃ become
the adapter (Eq. 11). IPM (instruction-previewed): covariances from the new task; the r largest do (Eq. 13). In both
the base weight becomes the residual weight W' = W − s·B₀A₀ (Eq. 12).

Where the adapter is scaled (s = α/r ≠ 1) both factors are divided by √s, so that s·B₀A₀ is the chosen block.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from harness.config import PositiveFloat, PositiveInt, Strict
from harness.decomposition.context_svd import component_factors, context_svd, damped
from harness.errors import UserError
from harness.methods.base import AdapterInit, Method, Statistics, StatisticsRequest
from harness.models.targets import Layer


class CorDAOptions(Strict):
    """``damping``: C̃ = C + damping · mean(diag C) · I. ``alpha`` is ``rank`` where it is not given."""

    mode: Literal["kpm", "ipm"]
    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    damping: PositiveFloat = 0.01


class CorDA(Method):
    """CorDA with a uniform rank."""

    Options = CorDAOptions
    summary = "CorDA: adapter from the smallest (kpm) or largest (ipm) components of W·C"
    paper = "Yang et al., 2024 (arXiv 2406.05223); CorDA++, 2025"

    def statistics(self) -> StatisticsRequest:
        """Input covariances on what must be kept (KPM) or on what must be learned (IPM)."""
        return StatisticsRequest("input_covariance", "preserve" if self.options.mode == "kpm" else "target")

    def ranks(self, layers: Sequence[Layer], statistics: Statistics | None) -> dict[str, int]:
        """The same rank everywhere."""
        return {layer.name: self.options.rank for layer in layers}

    def scaling(self) -> float:
        """s = α/r."""
        return (self.options.alpha or self.options.rank) / self.options.rank

    def initialise(self, layer: Layer, weight: torch.Tensor, rank: int, statistics: Statistics | None) -> AdapterInit:
        """B₀ and A₀ from the CO-SVD of ``weight`` (out, in); float64 inside, fp32 out.

        Raises:
            UserError: the layer's covariance is all zero (its input is constantly zero).
        """
        assert statistics is not None, "CorDA asks for statistics; the pipeline collects them"
        covariance = statistics.input_covariance(layer.name)
        C = covariance.matrix.to(weight.device)
        if float(C.diagonal().mean()) == 0.0:
            raise UserError(
                f"method: the input of layer {layer.name} is zero on every token; CorDA has no context for it"
            )
        components = min(layer.out_features, layer.in_features)
        kpm = self.options.mode == "kpm"
        cut = components - rank if kpm else rank
        decomposition = context_svd(weight, damped(C, self.options.damping), cut)
        B, A = component_factors(weight, decomposition, slice(cut, components) if kpm else slice(0, cut))
        split = self.scaling() ** -0.5
        B32, A32 = (B * split).float(), (A * split).float()
        exact = B @ A
        rounded = self.scaling() * (B32.double() @ A32.double())
        sigma = decomposition.sigma
        report = {
            "damping": self.options.damping,
            "covariance_tokens": covariance.tokens,
            "solver": decomposition.solver,
            "gram_error_estimate": decomposition.gram_error,
            "singular_value_max": float(sigma[0]),
            "singular_value_min": float(sigma[-1]),
            "singular_value_at_cut": float(sigma[min(cut, components - 1)]),
            "share_of_weight": float(exact.norm() / weight.double().norm()),
            "rounding_error": float((rounded - exact).norm() / exact.norm().clamp_min(1e-300)),
        }
        return AdapterInit(A32.cpu(), B32.cpu(), residual=True, report=report)
