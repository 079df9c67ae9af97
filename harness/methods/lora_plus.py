"""LoRA+ (Hayou et al., 2024): B learns faster than A, η_B = λ·η_A."""

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from harness.methods.lora import LoRA, LoRAOptions


class LoRAPlusOptions(LoRAOptions):
    """``ratio``: λ, 16 as its authors suggest; `train.learning_rate` is A's rate."""

    ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 16.0


class LoRAPlus(LoRA):
    """LoRA with two learning rates."""

    Options = LoRAPlusOptions
    summary = "LoRA+: LoRA whose B learns λ times faster than A"
    paper = "Hayou et al., 2024 (arXiv 2402.12354)"

    def param_groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """PEFT's groups for LoRA+, those without parameters left out."""
        from peft.optimizers import create_loraplus_optimizer

        groups = create_loraplus_optimizer(
            model,
            _Groups,
            lr=learning_rate,
            loraplus_lr_ratio=self.options.ratio,
            loraplus_weight_decay=weight_decay,
        ).param_groups
        return [group for group in groups if group["params"]]


class _Groups:
    """Stands where PEFT would make an optimiser and keeps the groups: DeepSpeed's optimiser is made elsewhere."""

    def __init__(self, param_groups: list[dict[str, Any]], **_: Any) -> None:
        self.param_groups = param_groups
