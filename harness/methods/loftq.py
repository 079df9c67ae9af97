"""LoftQ (Li et al., 2023): quantised base and adapter chosen together, so that Q + s·B·A is near the weight.

From A₀ = B₀ = 0, T times (Alg. 1 there):

    Q_t = nf4(W − s·B_{t−1}A_{t−1})        B_t, A_t = rank-r SVD of W − Q_t, split evenly, s·B_t A_t the block

The frozen base is Q_T = nf4(W − s·B_{T−1}A_{T−1}): what is taken out of W before it is quantised is the pair of the
step before, not the adapter's own. (PEFT's `loftq` runs on CUDA and XPU only, without double quantisation, and in
fp32; this is the same loop on any device, with the quantiser that the base is stored with.)
"""

from collections.abc import Mapping
from typing import Any

import torch

from harness.config import PositiveInt
from harness.decomposition.plain_svd import balanced_factors, plain_svd
from harness.methods.base import AdapterInit, LowRank, Statistics
from harness.methods.lora import LoRA, LoRAOptions
from harness.models.quantisation import nf4_values, residual_weight
from harness.models.targets import Layer


class LoftQOptions(LoRAOptions):
    """``iterations``: T, 5 as in the authors' scripts; with 1 the base is plain nf4(W)."""

    iterations: PositiveInt = 5


class LoftQ(LoRA):
    """LoRA's options and ``iterations``; needs `model.quantization: nf4`."""

    Options = LoftQOptions
    decomposes = True
    summary = "LoftQ: adapter and NF4 base chosen together to be near W"
    paper = "Li et al., 2023 (arXiv 2310.08659)"
    needs_quantised_base = True

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """B_T and A_T, and the pair B_{T−1}, A_{T−1} taken out of ``weight`` (out, in) before it is quantised.

        ``errors`` in the report are ‖W − Q_t − s·B_t A_t‖ / ‖W‖ after each iteration.
        """
        assert self.model is not None, "LoftQ must know how the base is stored"
        dtype, double = getattr(torch, self.model.dtype), self.model.double_quantization
        W, scaling = weight.double(), self.scaling()
        split = scaling**-0.5
        B = torch.zeros(layer.out_features, rank, device=weight.device)
        A = torch.zeros(rank, layer.in_features, device=weight.device)
        errors = []
        for _ in range(self.options.iterations):
            subtracted = (B, A)
            frozen = nf4_values(residual_weight(weight, LowRank(B, A, scaling), dtype), double).double()
            missing = W - frozen
            B64, A64 = balanced_factors(missing, plain_svd(missing, rank, self.solver, "first"))
            B, A = (B64 * split).float(), (A64 * split).float()
            left = missing - LowRank(B, A, scaling).dense().double()
            errors.append(float(left.norm() / W.norm().clamp_min(1e-300)))
        return AdapterInit(
            A.cpu(),
            B.cpu(),
            residual=False,
            subtracted=(subtracted[0].cpu(), subtracted[1].cpu()),
            report={"iterations": self.options.iterations, "errors": errors},
        )
