"""rsLoRA (Kalajdzievski, 2023): LoRA scaled by α/√r, so that larger ranks do not learn more slowly."""

import math

from harness.config import PositiveFloat
from harness.methods.lora import LoRA, LoRAOptions


class RsLoRAOptions(LoRAOptions):
    """``alpha``: 16 where it is not given, whatever the rank: s is no longer 1 then."""

    alpha: PositiveFloat = 16.0


class RsLoRA(LoRA):
    """LoRA with s = α/√r; exported as a plain LoRA with lora_alpha = α·√r."""

    Options = RsLoRAOptions
    summary = "rsLoRA: LoRA scaled by α/√r instead of α/r"
    paper = "Kalajdzievski, 2023 (arXiv 2312.03732)"

    def scaling(self) -> float:
        """s = α/√r."""
        return self.options.alpha / math.sqrt(self.options.rank)
