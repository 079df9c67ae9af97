"""Full fine-tuning: every weight is trained. The yardstick for T (FARSS, Eq. 37)."""

from torch import nn

from harness.methods.base import Method


class FullFineTuning(Method):
    """No adapter, no statistics; the update is whatever the weights became."""

    summary = "full fine-tuning: every weight is trained"
    paper = "the reference point of FARSS A.3"
    trains_base = trains_all = True

    def attach(self, model: nn.Module, ranks: object) -> nn.Module:
        """The model itself, all parameters trainable."""
        return model.requires_grad_(True)
