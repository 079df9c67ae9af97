"""FLoRA (Si et al., 2024): ΔW = s·G ×₁ A ×₂ B …, a core and one factor for each mode of a weight of any order.

For a linear layer ΔW = s·A·G·Bᵀ, exactly the LoRA with factors A·G and Bᵀ; a convolution has a factor for each kernel
axis besides (Eq. 5). PEFT's names: ``lora_B`` is A, ``lora_A`` is Bᵀ, ``lora_core`` is G.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from harness.adapters.tensor_forms import CORE, INPUTS, OUTPUTS, TensorUpdate, Tucker, write_adapter
from harness.config import PositiveFloat, PositiveInt, Strict
from harness.data.sampling import seed_for
from harness.methods.base import AdapterInit, LowRank, Method, Statistics, Update
from harness.models.targets import Layer


class FLoRAOptions(Strict):
    """``rank``: r₁ = r₂, or [r₁, r₂] of outputs and inputs; ``kernel_rank``: r₃ of convolutions; ``scale``: s.

    ``init``: how wide the Gaussian factors are drawn (see `harness.adapters.tensor_forms.Tucker`).
    """

    rank: PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] = 16
    kernel_rank: PositiveInt | None = None
    scale: PositiveFloat = 1.0
    init: Literal["fan_in", "reference"] = "fan_in"


class FLoRA(Method):
    """A Tucker form of the update, for linear layers and convolutions."""

    Options = FLoRAOptions
    decomposes = False
    summary = "FLoRA: a core and a factor for each mode, for linear layers and convolutions"
    paper = "Si et al., 2024 (arXiv 2405.14739)"
    trains_more_than_pair = True
    adapts_convolutions = True

    @property
    def form(self) -> Tucker:
        """The form that the options describe."""
        rank = self.options.rank if isinstance(self.options.rank, int) else tuple(self.options.rank)
        return Tucker(rank, self.options.kernel_rank, self.options.init)

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """r₃ must fit a kernel."""
        self.form.check(layers, "method.kernel_rank")

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """The larger of r₁ and r₂, of a convolution as far as its modes reach."""
        self.check_layers(layers)
        whole = self.options.rank if isinstance(self.options.rank, int) else max(self.options.rank)
        return {layer.name: max(self.form.ranks(layer)[:2]) if layer.kernel else whole for layer in layers}

    def scaling(self) -> float:
        """s."""
        return self.options.scale

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """Gaussian factors and a core of zeros, seeded by the run's seed and the layer's name."""
        generator = torch.Generator().manual_seed(seed_for(self.form.name, self.seed, layer.name))
        tensors = self.form.start(layer, generator)
        A, B = tensors.pop(INPUTS), tensors.pop(OUTPUTS)
        parameters = A.numel() + B.numel() + sum(tensor.numel() for tensor in tensors.values())
        report = {"ranks": list(self.form.ranks(layer)), "parameters": parameters}
        return AdapterInit(A, B, residual=False, report=report, extra=tensors)

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """Layers that run the factored path, in PEFT's protocol."""
        from harness.adapters.lora import attach
        from harness.adapters.tensor_layers import custom_modules

        config = self.adapter_config(ranks)
        config._register_custom_module(custom_modules(self.form))
        return attach(model, config)

    def update(self, tensors: Mapping[str, torch.Tensor], subtracted: LowRank | None) -> Update:
        """The LoRA with B = A·G (the paper's A) of a linear layer; of a convolution, ΔW as the factors give it."""
        if tensors[CORE].dim() > 2:
            return TensorUpdate(self.form, dict(tensors), self.scaling())
        return self.delta(LowRank(tensors[OUTPUTS] @ tensors[CORE], tensors[INPUTS], self.scaling()), subtracted)

    def write_adapter(
        self,
        folder: Path,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        updates: Mapping[str, Update],
        base_model: str,
    ) -> None:
        """A plain LoRA; with convolutions among the layers the factors themselves, which no engine serves."""
        write_adapter(folder, self.form, self.scaling(), tensors, updates, base_model)
