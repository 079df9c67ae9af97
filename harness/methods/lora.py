"""LoRA (Hu et al., 2022): ΔW = (α/r)·B·A, A Kaiming-uniform, B zero."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from harness.config import PositiveFloat, PositiveInt, Strict
from harness.data.sampling import seed_for
from harness.methods.base import AdapterInit, Method, Statistics
from harness.models.targets import Layer


class LoRAOptions(Strict):
    """``rank`` for every target layer; ``alpha`` is ``rank`` where it is not given, so that α/r = 1."""

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None


class LoRA(Method):
    """Plain LoRA: the baseline that everything is compared with."""

    Options = LoRAOptions
    decomposes = False
    summary = "LoRA: low-rank update, random A, zero B"
    paper = "Hu et al., 2022 (arXiv 2106.09685)"

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """The same rank everywhere."""
        return {layer.name: self.options.rank for layer in layers}

    def scaling(self) -> float:
        """s = α/r."""
        return (self.options.alpha or self.options.rank) / self.options.rank

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """A from U(−1/√in, 1/√in) (torch's Kaiming-uniform with a = √5, as in PEFT), B = 0.

        The generator is seeded by the run's seed and the layer's name: the same tensors on any number of ranks
        and in any order of layers.
        """
        generator = torch.Generator().manual_seed(seed_for("lora", self.seed, layer.name))
        bound = 1 / math.sqrt(layer.in_features)
        A = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        return AdapterInit(A, torch.zeros(layer.out_features, rank), residual=False)
