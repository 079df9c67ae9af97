"""What the methods of the form ΔW = s·U·diag(σ)·Vᵀ share (`harness.adapters.singular`): FCLoRA, KaSA, SORSA."""

from collections.abc import Mapping

import torch

from harness.methods.base import LowRank, Update
from harness.methods.lora import LoRA


class SingularFormMethod(LoRA):
    """A LoRA with singular values between its factors: U is ``lora_B``, Vᵀ ``lora_A``, σ ``lora_sigma``.

    The same rank everywhere. A subclass whose options have no ``alpha`` has s = 1.
    """

    trains_more_than_pair = True

    def scaling(self) -> float:
        """s = α/r, 1 where there is no α."""
        return super().scaling() if hasattr(self.options, "alpha") else 1.0

    def singular_vectors(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """U (out, r) and V (in, r) as trained."""
        return tensors["lora_B.weight"], tensors["lora_A.weight"].T

    def update(self, tensors: Mapping[str, torch.Tensor], subtracted: LowRank | None) -> Update:
        """The LoRA with B = U and A = diag(σ)·Vᵀ, less what was taken out of the base weight."""
        from harness.adapters.lora import low_rank

        return self.delta(low_rank(tensors, self.scaling()), subtracted)
