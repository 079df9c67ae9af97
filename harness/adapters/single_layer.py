"""PEFT's own initialisations, called on a model of one layer, so that layers can be shared out among ranks."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

LAYER = "layer"


class _OneLayer(nn.Module):
    """A model whose only layer holds a copy of ``weight`` (out, in) in fp32; PEFT changes that copy."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.layer = nn.Linear(in_features, out_features, bias=False, device="meta")
        self.layer.weight = nn.Parameter(weight.detach().float().clone(), requires_grad=False)


def peft_factors(
    weight: torch.Tensor, rank: int, scaling: float, gradient: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in), fp32, as PEFT initialises them with ``LoraConfig(**options)``.

    Args:
        weight: base weight, (out, in); it is not changed.
        gradient: gradient of the loss with respect to the weight, (out, in), where the initialisation takes one.
    """
    model = _OneLayer(weight)
    if gradient is not None:
        model.layer._peft_loraga_grad = gradient.to(weight.device, torch.float32)
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=[LAYER], lora_dropout=0.0, **options)
    adapted = get_peft_model(model, config).get_submodule(f"base_model.model.{LAYER}")
    B, A = adapted.lora_B["default"].weight, adapted.lora_A["default"].weight
    return B.detach().float(), A.detach().float()
