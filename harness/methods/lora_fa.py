"""LoRA-FA (Zhang et al., 2023): A stays as it was drawn, B alone is trained.

Half the trained parameters and optimiser state, and no activations kept for A's gradient.
"""

from collections.abc import Mapping

from torch import nn

from harness.methods.lora import LoRA


class LoRAFA(LoRA):
    """LoRA's options and initial tensors, A frozen."""

    summary = "LoRA-FA: LoRA with A frozen; only B is trained"
    paper = "Zhang et al., 2023 (arXiv 2308.03303)"

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """PEFT LoRA with A frozen."""
        from harness.adapters.lora import freeze_a

        model = super().attach(model, ranks)
        freeze_a(model)
        return model
