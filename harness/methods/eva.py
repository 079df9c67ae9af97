"""EVA (Paischer et al., 2024): A from the directions in which inputs vary most, ranks where those explain most.

With the eigenvectors v_1, v_2, … of the input covariance on the new task (the right singular vectors of the inputs) and
their explained variance ratios λ_i / tr C, A₀ = [v_1 … v_r]ᵀ and B₀ = 0. Ranks are redistributed: the components of all
layers are sorted by ratio and the first Σ r of them are taken, at most ρ·r from any layer; layers may end with none.

The paper (and PEFT) find the vectors by an incremental SVD over batches, inside one process, until they settle. Here
they come from the covariance over all sampled tokens, which is exact and the same for any batch size and number of
ranks. Two things differ from PEFT for that: its incremental SVD subtracts the mean input, and it looks by default at
response tokens alone, where the covariance is that of all real tokens about zero.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from harness.decomposition.partial import leading_eigenvectors
from harness.decomposition.plain_svd import oriented
from harness.methods.base import AdapterInit, Statistics, StatisticsRequest
from harness.methods.lora import LoRA, LoRAOptions
from harness.models.targets import Layer


class EVAOptions(LoRAOptions):
    """``rank`` is the mean; ``rho``: no layer gets more than ρ·rank. With 1 there is nothing to redistribute."""

    rho: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0


class EVA(LoRA):
    """α/r is ``alpha / rank`` in every layer, whatever rank it gets."""

    Options = EVAOptions
    decomposes = True
    summary = "EVA: A from the main directions of the task's inputs, ranks by explained variance"
    paper = "Paischer et al., 2024 (arXiv 2410.07170)"

    def statistics(self) -> StatisticsRequest:
        """Input covariances on the new task."""
        return StatisticsRequest(("input_covariance",), "target")

    def examine(self, layer: Layer, weight: torch.Tensor, statistics: Statistics | None) -> dict[str, Any]:
        """Explained variance ratios of the components that the layer may get, descending."""
        assert statistics is not None, "EVA asks for statistics; the pipeline collects them"
        C = statistics.input_covariance(layer.name).matrix.to(weight.device).double()
        values = torch.linalg.eigvalsh(C).flip(-1).clamp_min(0)
        most = min(round(self.options.rank * self.options.rho), layer.in_features, layer.out_features)
        ratios = values[:most] / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return {"explained_variance": ratios.tolist()}

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """Σ r components of all layers by explained variance; a component that explains nothing is never taken.

        Layers that read the same input have the same ratios: of equal ones the earlier layer's comes first.
        """
        components = [
            (-ratio, index, number)
            for number, layer in enumerate(layers)
            for index, ratio in enumerate(findings[layer.name]["explained_variance"])
            if ratio > 0
        ]
        ranks = {layer.name: 0 for layer in layers}
        for _, _, number in sorted(components)[: self.options.rank * len(layers)]:
            ranks[layers[number].name] += 1
        return ranks

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """The top ``rank`` eigenvectors of the input covariance as rows of A, (rank, in); B = 0."""
        assert statistics is not None, "EVA asks for statistics; the pipeline collects them"
        covariance = statistics.input_covariance(layer.name)
        vectors = leading_eigenvectors(covariance.matrix.to(weight.device).double(), rank, self.solver)
        A = oriented(vectors).T.float().cpu()
        explained = sum(finding["explained_variance"][:rank])
        report = {"covariance_tokens": covariance.tokens, "explained_variance_total": explained}
        return AdapterInit(A, torch.zeros(layer.out_features, rank), residual=False, report=report)
