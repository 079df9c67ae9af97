"""FARSS (Chen et al.): inverse rank allocation in shallow layers, singular directions chosen by a K-FAC Fisher.

Deep layers adapt the R singular directions of W to which the new task's loss is most sensitive (Eq. 16). Shallow
layers, the first `shallow_layers` decoder blocks, hold much of what the model knows: they adapt the least sensitive
directions (Eq. 17), the fewer of them the more important the layer (Eq. 8–12). In both the base weight becomes the
residual weight W' = W − s·B₀A₀.

Where the adapter is scaled (s = α/R ≠ 1) both factors are divided by √s, so that s·B₀A₀ is the chosen block.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from harness.config import ModelConfig, PositiveFloat, PositiveInt, Strict
from harness.decomposition.fisher import (
    ScoredDirections,
    direction_factors,
    full_svd,
    importance,
    inverse_ranks,
    scored_directions,
)
from harness.errors import UserError
from harness.methods.base import AdapterInit, Method, ProbeRequest, Statistics, StatisticsRequest, moved_block
from harness.models.targets import Layer, depth_of


class FARSSOptions(Strict):
    """``rank`` (R) of deep layers; ``r_min``, ``r_avg`` and ``r_max`` of shallow ones, scaled from R where not given.

    ``alpha`` is ``rank`` where it is not given, so that s = 1.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    r_min: PositiveInt = 1
    r_max: PositiveInt | None = None
    r_avg: PositiveInt | None = None
    shallow_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    variant: Literal["farss", "all-high", "farss-init"] = "farss"
    fisher: Literal["empirical", "mc"] = "empirical"
    probe_steps: PositiveInt = 20
    probe_rows: PositiveInt = 64

    @field_validator("r_max")
    @classmethod
    def _r_max_is_not_below_r_min(cls, value: int | None, info: ValidationInfo) -> int | None:
        r_min = info.data.get("r_min", 1)
        if value is not None and value < r_min:
            raise ValueError(f"r_min ({r_min}) or more")
        return value

    @field_validator("r_avg")
    @classmethod
    def _r_avg_lies_between(cls, value: int | None, info: ValidationInfo) -> int | None:
        if {"rank", "r_min", "r_max"} <= info.data.keys():  # else one of them is wrong, and the message is about that
            r_min, r_max = info.data["r_min"], _r_max(info.data["rank"], info.data["r_min"], info.data["r_max"])
            if value is not None and not r_min <= value <= r_max:
                raise ValueError(f"from r_min ({r_min}) to r_max ({r_max})")
        return value

    @property
    def shallow_ranks(self) -> tuple[int, int, int]:
        """``(r_min, r_avg, r_max)``; where not given, in the proportions that the paper has for R = 128: 50 and 64."""
        r_max = _r_max(self.rank, self.r_min, self.r_max)
        r_avg = min(max(round(self.rank * 50 / 128), self.r_min), r_max) if self.r_avg is None else self.r_avg
        return self.r_min, r_avg, r_max


def _r_max(rank: int, r_min: int, given: int | None) -> int:
    return max(r_min, rank // 2) if given is None else given


class FARSS(Method):
    """FARSS and its two variants.

    ``all-high``: shallow layers take their most sensitive directions too, at the ranks allocated to them (Table 6).
    ``farss-init``: every layer takes its R least sensitive directions, and no rank is allocated (Table 4).
    """

    Options = FARSSOptions
    summary = "FARSS: few insensitive directions in shallow layers, sensitive ones in deep layers"
    paper = "Chen et al., FARSS: Fisher-Optimized Adaptive Low-Rank and Singular-Vector Selection"

    def __init__(self, options: FARSSOptions, seed: int = 0, model: ModelConfig | None = None) -> None:
        super().__init__(options, seed, model)
        self._newest: list[tuple[torch.Tensor, Statistics | None, ScoredDirections]] = []  # of one layer at most

    def statistics(self) -> StatisticsRequest:
        """Both K-FAC factors on the task that is to be learned (§3.2)."""
        return StatisticsRequest(("input_covariance", "output_gradient_covariance"), "target", 1, self.options.fisher)

    def scaling(self) -> float:
        """s = α/R, in shallow layers too, whatever their rank."""
        return (self.options.alpha or self.options.rank) / self.options.rank

    # -- the boundary between shallow and deep layers ----------------------------------------------------------------

    def probe(self) -> ProbeRequest | None:
        """Probes choose the boundary where it is ``auto``."""
        if self.options.shallow_layers != "auto" or self.options.variant == "farss-init":
            return None
        return ProbeRequest("shallow_layers", self.options.probe_steps, self.options.probe_rows)

    def candidates(self, layers: Sequence[Layer]) -> list[FARSSOptions]:
        """Boundaries from an eighth to a quarter of the decoder blocks (§3.1), the shallowest first."""
        if self.probe() is None:
            return []
        blocks = _blocks(layers)
        first = math.ceil(blocks / 8)
        boundaries = range(first, max(first, blocks // 4) + 1)
        return [self.options.model_copy(update={"shallow_layers": boundary}) for boundary in boundaries]

    def _is_shallow(self, layer: Layer) -> bool:
        if self.options.variant == "farss-init":
            return False
        depth = depth_of(layer.name)
        return depth is not None and depth < self.options.shallow_layers

    # -- ranks and tensors -------------------------------------------------------------------------------------------

    def examine(self, layer: Layer, weight: torch.Tensor, statistics: Statistics | None) -> dict[str, Any]:
        """The layer's Fisher importance (Eq. 8)."""
        factors = _kfac_factors(layer, weight, statistics)
        return {"importance": importance(weight, *factors)}

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """R in deep layers, inverse allocation in shallow ones (Eq. 9–12), there no more than the layer allows.

        Raises:
            UserError: there are fewer decoder blocks than ``shallow_layers``.
        """
        given, blocks = self.options.shallow_layers, _blocks(layers)
        if self.options.variant != "farss-init" and given > blocks:
            raise UserError(
                f"method.shallow_layers: {given} given; the layers to adapt lie in {blocks} decoder blocks, so at most "
                f"{blocks}"
            )
        shallow = [layer for layer in layers if self._is_shallow(layer)]
        allocated = inverse_ranks(
            [findings[layer.name]["importance"] for layer in shallow], *self.options.shallow_ranks
        )
        ranks = {layer.name: self.options.rank for layer in layers}
        for layer, rank in zip(shallow, allocated, strict=True):
            ranks[layer.name] = min(rank, layer.out_features, layer.in_features)
        return ranks

    def summarise(
        self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, int]
    ) -> dict[str, Any]:
        """The boundary, and the shallow ranks' sum beside its budget (Eq. 10), which clipping need not keep."""
        if self.options.variant == "farss-init":
            return {}
        shallow = [layer.name for layer in layers if self._is_shallow(layer)]
        return {
            "shallow_layers": self.options.shallow_layers,
            "shallow_rank_budget": self.options.shallow_ranks[1] * len(shallow),
            "shallow_rank_sum": sum(ranks[name] for name in shallow),
        }

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """B₀ and A₀ from the singular directions of ``weight`` (out, in); float64 inside, fp32 out."""
        directions = self._directions(layer, weight, statistics)
        count = len(directions.sigma)
        shallow = self._is_shallow(layer)
        low = self.options.variant == "farss-init" or (self.options.variant == "farss" and shallow)
        chosen = slice(count - rank, count) if low else slice(0, rank)
        B, A = direction_factors(directions, chosen)
        sigma, scores = directions.sigma[chosen], directions.scores
        report = {
            "shallow": shallow,
            "directions": "low" if low else "high",
            "singular_value_max": float(sigma.max()),
            "singular_value_min": float(sigma.min()),
            "share_of_scores": float(scores[chosen].sum() / scores.sum()) if float(scores.sum()) > 0 else None,
        }
        return moved_block(weight, B, A, self.scaling(), report)

    def _directions(self, layer: Layer, weight: torch.Tensor, statistics: Statistics | None) -> ScoredDirections:
        """The scored directions of ``weight``. The newest are kept: each candidate boundary asks for them in turn."""
        if not self._newest or self._newest[0][0] is not weight or self._newest[0][1] is not statistics:
            self._newest.clear()
            svd = self.kept(
                weight,
                {"values": "all"},
                lambda: dict(zip(("U", "sigma", "Vh"), full_svd(weight), strict=True)),
            )
            directions = scored_directions(
                weight, *_kfac_factors(layer, weight, statistics), svd=(svd["U"], svd["sigma"], svd["Vh"])
            )
            self._newest.append((weight, statistics, directions))
        return self._newest[0][2]


def _kfac_factors(
    layer: Layer, weight: torch.Tensor, statistics: Statistics | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_h (in, in) and Σ_δ (out, out), where the weight is."""
    assert statistics is not None, "FARSS asks for statistics; the pipeline collects them"
    return (
        statistics.input_covariance(layer.name).matrix.to(weight.device),
        statistics.output_gradient_covariance(layer.name).matrix.to(weight.device),
    )


def _blocks(layers: Sequence[Layer]) -> int:
    """How many decoder blocks the layers show: one more than the greatest depth."""
    return 1 + max((depth for layer in layers if (depth := depth_of(layer.name)) is not None), default=-1)
