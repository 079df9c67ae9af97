"""DoRA (Liu et al., 2024): W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖, magnitude and direction trained apart.

‖·‖ is the norm of each row of the (out, in) weight: the paper's column norm, its weights being (in, out). PEFT's layer
is used; as in the paper (§4.3), it treats the norm as a constant in the backward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.errors import UserError
from harness.methods.base import AdapterInit, LowRank, Statistics, Update
from harness.methods.lora import LoRA
from harness.models.quantisation import nf4_values
from harness.models.targets import Layer

if TYPE_CHECKING:
    from peft import PeftConfig

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class MagnitudeUpdate:
    """ΔW = m ⊙ (W + D) / ‖W + D‖ − W with D the ``direction`` and m the ``magnitude`` (out,). It depends on W."""

    direction: LowRank
    magnitude: torch.Tensor

    def dense(self, weight: torch.Tensor) -> torch.Tensor:
        """ΔW of ``weight`` (out, in), fp32."""
        moved = weight.float() + self.direction.dense().float().to(weight.device)
        norm = torch.linalg.vector_norm(moved, dim=1)
        return (self.magnitude.float().to(weight.device) / norm).unsqueeze(1) * moved - weight.float()


class DoRA(LoRA):
    """LoRA for the direction, a vector per layer for the magnitude of each output."""

    summary = "DoRA: low-rank update of the direction, trained magnitudes"
    paper = "Liu et al., 2024 (arXiv 2402.09353)"
    trains_more_than_pair = True

    def adapter_config(self, ranks: Mapping[str, int], base_model: str | None = None) -> "PeftConfig":
        """PEFT's LoRA configuration with ``use_dora``."""
        from harness.adapters.lora import lora_config

        return lora_config(ranks, self.scaling(), base_model, use_dora=True)

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """PEFT's DoRA layers.

        Raises:
            UserError: the base is quantised and ZeRO-3 is to partition it.
        """
        from transformers.integrations import is_deepspeed_zero3_enabled

        if getattr(model, "is_loaded_in_4bit", False) and is_deepspeed_zero3_enabled():
            # PEFT's layer dequantises the weight itself and may put a new parameter in its place.
            raise UserError("train.deepspeed: ZeRO-3 given; dora over model.quantization: nf4 works under ZeRO 1 and 2")
        return super().attach(model, ranks)

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """LoRA's A and B, and m = ‖W‖ of the weight that is computed with: over an NF4 base the quantised one."""
        if self.model is not None and self.model.quantization == "nf4":
            weight = nf4_values(weight, self.model.double_quantization)
        magnitude = torch.linalg.vector_norm(weight.float(), dim=1)
        return replace(super().initialise(layer, weight, rank, statistics, finding), extra={MAGNITUDE: magnitude})

    def update(self, tensors: Mapping[str, torch.Tensor], subtracted: LowRank | None) -> Update:
        """m ⊙ (W + s·B·A) / ‖W + s·B·A‖ − W: it has no factored form."""
        A, B = (tensors[name] for name in self.pair)
        return MagnitudeUpdate(LowRank(B, A, self.scaling()), tensors[MAGNITUDE])

    def write_adapter(
        self,
        folder: Path,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        updates: Mapping[str, Update],
        base_model: str,
    ) -> None:
        """PEFT's own DoRA adapter on the original base. vLLM cannot serve it."""
        from harness.adapters.lora import write_layers

        ranks = {name: own[self.pair[0]].shape[0] for name, own in tensors.items()}
        write_layers(folder, tensors, self.adapter_config(ranks, base_model))
