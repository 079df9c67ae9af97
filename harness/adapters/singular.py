"""Adapters of the form ΔW = s·U·diag(σ)·Vᵀ: a LoRA with a vector of singular values between its factors.

U is ``lora_B`` (out, r), Vᵀ is ``lora_A`` (r, in), σ is ``lora_sigma`` (r). The layers are PEFT's own, given a variant:
whatever works on a LoRA layer (a quantised base, adapters switched off, a second adapter beside) works on these. σ is a
module, because ZeRO-3 gathers parameters by module.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn

from harness.adapters.lora import TRAINED, lora_layers


class SingularValues(nn.Module):
    """Multiplies the last dimension, (…, r), by σ (r)."""

    def __init__(self, rank: int, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(rank, dtype=like.dtype, device=like.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ⊙ σ, in the shape of ``x``."""
        return x * self.weight


class SingularForm(LoraVariant):
    """x → s·U(σ ⊙ (Vᵀ x)): one path like LoRA's. s multiplies r numbers, where LoRA multiplies all outputs."""

    def supports_lora_conversion(self) -> bool:
        """PEFT's conversion leaves σ out; `Method.update` has the exact LoRA."""
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: `add_singular_values` makes σ."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """``result`` of the base layer, with the adapter's output added."""
        inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        inner = module.lora_sigma[active_adapter](inner)
        scaling = module.scaling[active_adapter]
        return result + module.lora_B[active_adapter](inner if scaling == 1 else inner * scaling)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight with ΔW added, as a new tensor."""
        return orig_weight + _update(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Add ΔW in place."""
        orig_weight.data += _update(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight without ΔW."""
        return orig_weight - _update(module, active_adapter).to(orig_weight.dtype)


def _update(module: LoraLayer, adapter: str) -> torch.Tensor:
    B, A = (getattr(module, name)[adapter].weight.float() for name in ("lora_B", "lora_A"))
    return module.scaling[adapter] * (B * module.lora_sigma[adapter].weight.float()) @ A


def add_singular_values(model: PeftModel, bounded: bool = False) -> None:
    """Give every layer of the trained LoRA its σ.

    ``bounded``: and a frozen number ``lora_bound`` (1,), the largest that σ may become.
    """
    for layer in lora_layers(model).values():
        like = layer.lora_A[TRAINED].weight
        layer.lora_sigma = nn.ModuleDict({TRAINED: SingularValues(layer.r[TRAINED], like)})
        # By these names PEFT finds what it freezes and trains when adapters are switched off and on.
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_sigma")
        layer.lora_variant[TRAINED] = SingularForm()
        if bounded:
            bound = nn.Parameter(torch.full((1,), torch.inf, dtype=like.dtype, device=like.device), requires_grad=False)
            layer.lora_bound = nn.ParameterDict({TRAINED: bound})


def singular_values(model: PeftModel) -> list[nn.Parameter]:
    """σ of every layer, in the model's order."""
    return [layer.lora_sigma[TRAINED].weight for layer in lora_layers(model).values()]


def bounds(model: PeftModel) -> list[nn.Parameter]:
    """What `add_singular_values` made as ``lora_bound``, in the same order."""
    return [layer.lora_bound[TRAINED] for layer in lora_layers(model).values()]


def singular_vectors(model: PeftModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """U (out, r) and Vᵀ (r, in) of every layer, in the same order."""
    layers = lora_layers(model).values()
    return [layer.lora_B[TRAINED].weight for layer in layers], [layer.lora_A[TRAINED].weight for layer in layers]
