"""LoRA on convolutions (FLoRA's Eq. 3, after Hu et al.): ΔW = s·Reshape(B·A); on linear layers it is LoRA.

It is what FLoRA is compared with: r·k·(d_in + d_out) numbers for a k × k kernel. Its forward pass forms ΔW.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from harness.adapters.tensor_forms import INPUTS, OUTPUTS, Reshaped, TensorUpdate, write_adapter
from harness.data.sampling import seed_for
from harness.methods.base import AdapterInit, LowRank, Statistics, Update
from harness.methods.lora import LoRA, LoRAOptions
from harness.models.targets import Layer


class LoRAConvOptions(LoRAOptions):
    """LoRA's, and ``layout``: how the matrix becomes a kernel (see `harness.adapters.tensor_forms.Reshaped`)."""

    layout: Literal["reshape", "axes"] = "reshape"


class LoRAConv(LoRA):
    """Plain LoRA that adapts convolutions too."""

    Options = LoRAConvOptions
    summary = "LoRA on convolutions too: their kernels reshaped to a matrix"
    trains_more_than_pair = True
    adapts_convolutions = True

    @property
    def form(self) -> Reshaped:
        """The form that the options describe."""
        return Reshaped(self.options.rank, self.options.layout)

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """The same rank everywhere, of a convolution as far as its matrix reaches."""
        return {
            layer.name: self.form.shapes(layer)[INPUTS][0] if layer.kernel else self.options.rank for layer in layers
        }

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """As LoRA; linear layers start as they do there."""
        if not layer.kernel:
            return super().initialise(layer, weight, rank, statistics, finding)
        generator = torch.Generator().manual_seed(seed_for("lora", self.seed, layer.name))
        tensors = self.form.start(layer, generator)
        return AdapterInit(tensors[INPUTS], tensors[OUTPUTS], residual=False)

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """PEFT's LoRA on linear layers, and layers of this form on convolutions."""
        from harness.adapters.lora import attach
        from harness.adapters.tensor_layers import custom_modules

        config = self.adapter_config(ranks)
        config._register_custom_module(custom_modules(self.form, linear=False))
        return attach(model, config)

    def update(self, tensors: Mapping[str, torch.Tensor], subtracted: LowRank | None) -> Update:
        """LoRA's for a linear layer; of a convolution the reshaped matrix."""
        if tensors[INPUTS].dim() > 2:
            return TensorUpdate(self.form, dict(tensors), self.scaling())
        return super().update(tensors, subtracted)

    def write_adapter(
        self,
        folder: Path,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        updates: Mapping[str, Update],
        base_model: str,
    ) -> None:
        """A plain LoRA; with convolutions among the layers the factors themselves, which no engine serves."""
        write_adapter(folder, self.form, self.scaling(), tensors, updates, base_model)
