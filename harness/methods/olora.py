"""OLoRA (Büyükakyüz, 2024): orthonormal B₀ from the QR factorisation of the weight.

W = Q R; B₀ = Q_r (the first r columns), A₀ = R_r (the first r rows), and the base weight becomes W − s·B₀A₀. PEFT's own
initialisation is called, layer by layer.
"""

from collections.abc import Mapping
from typing import Any

import torch

from harness.methods.base import AdapterInit, Statistics
from harness.methods.lora import LoRA
from harness.models.targets import Layer


class OLoRA(LoRA):
    """LoRA's options. α does not change B₀ and A₀: with α ≠ r the block taken out of the weight is s·Q_r R_r."""

    decomposes = True
    summary = "OLoRA: orthonormal B and triangular A from the QR of W"
    paper = "Büyükakyüz, 2024 (arXiv 2406.01775)"

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """Q_r and R_r of ``weight`` (out, in), fp32."""
        from harness.adapters.single_layer import peft_factors

        B, A = peft_factors(weight, rank, self.scaling(), init_lora_weights="olora")
        share = self.scaling() * float(torch.linalg.norm(B @ A) / weight.float().norm().clamp_min(1e-30))
        return AdapterInit(A.cpu(), B.cpu(), residual=True, report={"share_of_weight": share})
