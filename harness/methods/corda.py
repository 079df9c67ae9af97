"""CorDA and CorDA++ (Yang et al., NeurIPS 2024; CorDA++ §III-B, §IV, §V-A, §V-B): context-oriented initialisation.

KPM (knowledge-preserved): covariances from data whose knowledge must stay; the r smallest components of W·C̃ become
the adapter (Eq. 11). IPM (instruction-previewed): covariances from the new task; the r largest do (Eq. 13). In both
the base weight becomes the residual weight W' = W − s·B₀A₀ (Eq. 12).

CorDA++ adds two choices per layer. With ``rounds`` > 1, dynamic covariance selection: of the covariances of several
sampling rounds the one with the smallest score (Algorithm 1). With ``dynamic_rank``, dynamic rank allocation: the
parameters of a uniform rank, shared out by compactness (Algorithm 2).

Where the adapter is scaled (s = α/r ≠ 1) both factors are divided by √s, so that s·B₀A₀ is the chosen block.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from harness.config import PositiveFloat, PositiveInt, Strict
from harness.decomposition.compactness import log_compactness, selection_score
from harness.decomposition.context_svd import (
    Solver,
    component_factors,
    context_svd,
    damped,
    reference_damping,
    singular_values,
)
from harness.decomposition.rank_allocation import Spectrum, allocate_ranks
from harness.errors import UserError
from harness.methods.base import AdapterInit, Method, Statistics, StatisticsRequest, moved_block
from harness.models.targets import Layer
from harness.statistics.statistic import Statistic

SPECTRUM = "_singular_values"  # for `ranks` alone: too long for the report


class CorDAOptions(Strict):
    """``damping``: C̃ = C + damping · mean(diag C) · I; ``reference``: 0.01, doubled until the fp32 inverse looks right.

    ``alpha`` is ``rank`` where it is not given. ``rounds``: sampling rounds to choose a covariance from. With
    ``dynamic_rank`` layers differ in rank and share the parameters that ``rank`` everywhere would take.
    """

    mode: Literal["kpm", "ipm"]
    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    damping: PositiveFloat | Literal["reference"] = 0.01
    rounds: PositiveInt = 1
    dynamic_rank: bool = False


class CorDA(Method):
    """CorDA with one sampling round and a uniform rank, CorDA++ with several rounds and dynamic ranks."""

    Options = CorDAOptions
    summary = "CorDA: adapter from the smallest (kpm) or largest (ipm) components of W·C"
    paper = "Yang et al., 2024 (arXiv 2406.05223); CorDA++, 2025"

    def statistics(self) -> StatisticsRequest:
        """Input covariances on what must be kept (KPM) or on what must be learned (IPM)."""
        data = "preserve" if self.options.mode == "kpm" else "target"
        return StatisticsRequest(("input_covariance",), data, rounds=self.options.rounds)

    def examine(self, layer: Layer, weight: torch.Tensor, statistics: Statistics | None) -> dict[str, Any]:
        """Algorithm 1: the score of every sampling round (Eq. 7) and the first with the smallest (Eq. 8).

        With ``dynamic_rank`` also the singular values of W·C̃ for the chosen round. Nothing for plain CorDA.

        Raises:
            UserError: the layer's covariance is all zero (its input is constantly zero).
        """
        if self.options.rounds == 1 and not self.options.dynamic_rank:
            return {}
        dampings, log_pis, scores = [], [], []
        for number in range(self.options.rounds):
            C = self._covariance(layer, statistics, number).matrix.to(weight.device)
            dampings.append(self._damping(C))
            C_damped = damped(C, dampings[-1])
            log_pis.append(log_compactness(C_damped, layer.out_features))
            solver: Solver = "svd" if self.solver == "svd" else "gram"  # enough for a sum over all values
            scores.append(selection_score(singular_values(weight, C_damped, solver), log_pis[-1]))
        chosen = scores.index(min(scores))
        finding = {
            "round": chosen,
            "selection_score": scores[chosen],
            "selection_scores": scores,
            "log_pi": log_pis[chosen],
            "damping": dampings[chosen],
        }
        if self.options.dynamic_rank:
            C = self._covariance(layer, statistics, chosen).matrix.to(weight.device)
            finding[SPECTRUM] = singular_values(weight, damped(C, dampings[chosen]), self.solver).tolist()
        return finding

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """The same rank everywhere, or Algorithm 2 within the parameters that this would take.

        Raises:
            UserError: dynamic ranks are asked for and ``rank`` is larger than every layer.
        """
        if not self.options.dynamic_rank:
            return {layer.name: self.options.rank for layer in layers}
        widest = max(min(layer.in_features, layer.out_features) for layer in layers)
        if self.options.rank > widest:
            raise UserError(f"method.rank: {self.options.rank} given; no layer has more than {widest} components")
        spectra = [
            Spectrum(
                torch.tensor(findings[layer.name][SPECTRUM], dtype=torch.float64),
                findings[layer.name]["log_pi"],
                layer.in_features + layer.out_features,
            )
            for layer in layers
        ]
        ranks = allocate_ranks(spectra, self._budget(layers), self.options.mode)
        return {layer.name: rank for layer, rank in zip(layers, ranks, strict=True)}

    def summarise(
        self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, int]
    ) -> dict[str, Any]:
        """With dynamic ranks, the parameter budget τ and what was spent of it."""
        if not self.options.dynamic_rank:
            return {}
        spent = sum(ranks[layer.name] * (layer.in_features + layer.out_features) for layer in layers)
        return {"parameter_budget": self._budget(layers), "adapter_parameters": spent}

    def scaling(self) -> float:
        """s = α/r, with the rank of the options whatever rank a layer gets."""
        return (self.options.alpha or self.options.rank) / self.options.rank

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """B₀ and A₀ from the CO-SVD of ``weight`` (out, in); float64 inside, fp32 out.

        Raises:
            UserError: the layer's covariance is all zero (its input is constantly zero).
        """
        covariance = self._covariance(layer, statistics, finding.get("round", 0))
        C = covariance.matrix.to(weight.device)
        damping = self._damping(C)
        components = min(layer.out_features, layer.in_features)
        kpm = self.options.mode == "kpm"
        cut = components - rank if kpm else rank
        decomposition = context_svd(
            weight, C, cut, self.solver, "rest" if kpm else "first", damping * float(C.diagonal().double().mean())
        )
        B, A = component_factors(weight, decomposition)
        report = {
            "damping": damping,
            "covariance_tokens": covariance.tokens,
            "solver": decomposition.solver,
            "gram_error_estimate": decomposition.gram_error,
            "singular_value_max": decomposition.largest,
            "singular_value_at_cut": decomposition.beyond_cut,
        }
        if decomposition.smallest is not None:
            report["singular_value_min"] = decomposition.smallest
        return moved_block(weight, B, A, self.scaling(), report)

    def _covariance(self, layer: Layer, statistics: Statistics | None, number: int) -> Statistic:
        assert statistics is not None, "CorDA asks for statistics; the pipeline collects them"
        covariance = statistics.input_covariance(layer.name, number)
        if float(covariance.matrix.diagonal().mean()) == 0.0:
            raise UserError(
                f"method: the input of layer {layer.name} is zero on every token; CorDA has no context for it"
            )
        return covariance

    def _budget(self, layers: Sequence[Layer]) -> int:
        """τ: the parameters of adapters of rank ``rank`` everywhere."""
        return self.options.rank * sum(layer.in_features + layer.out_features for layer in layers)

    def _damping(self, C: torch.Tensor) -> float:
        return reference_damping(C) if self.options.damping == "reference" else self.options.damping
