"""The Tucker form of a tensor of any order (FLoRA, arXiv 2405.14739, Eq. 4): a core and one factor for each mode."""

from collections.abc import Sequence

import torch


def mode_product(tensor: torch.Tensor, factor: torch.Tensor, mode: int) -> torch.Tensor:
    """``tensor ×_n factor``: every fibre of ``tensor`` along ``mode`` (from 0), of length J, times ``factor`` (I, J).

    Returns:
        The tensor with I in the place of J.
    """
    return torch.tensordot(tensor, factor, dims=([mode], [1])).movedim(-1, mode)


def tucker_product(core: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """``core ×₁ A⁽¹⁾ ×₂ A⁽²⁾ …`` of a core (J₁, …, J_N) and factors (I_n, J_n): a tensor (I₁, …, I_N)."""
    for mode, factor in enumerate(factors):
        core = mode_product(core, factor, mode)
    return core
