"""Reading and writing whole parameters, whether or not ZeRO has divided them, or their fp32 masters, over the ranks.

A parameter that is trained under DeepSpeed stands in two places: what the forward pass reads, and its fp32 master, from
which every optimiser step writes the former anew. Without DeepSpeed the parameter itself is all there is.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Inside the block every parameter is whole on every rank; outside it, as it was.

    With ``write`` the changes of rank 0 are kept (ZeRO-3 scatters them again). Collective under ZeRO-3: every rank
    must enter.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def has_master(parameter: nn.Parameter) -> bool:
    """Whether a DeepSpeed optimiser keeps an fp32 master of it."""
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def read_trained(parameter: nn.Parameter) -> torch.Tensor:
    """The whole fp32 value of a trained parameter: its master. Collective under DeepSpeed."""
    if not has_master(parameter):
        return parameter.detach().float()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


@torch.no_grad()
def write_trained(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set a trained parameter to the whole ``value``: master and what the forward pass reads. Collective."""
    write_master(parameter, value)
    with gathered([parameter], write=True):
        parameter.copy_(value)


def write_master(parameter: nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
    """Set the master (or a moment of it, ``exp_avg``) alone to the whole ``value``; nothing without DeepSpeed."""
    if not has_master(parameter):
        return
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)
        return
    # This rank's part under ZeRO-3: equal parts, the last one padded, which DeepSpeed's full setters forget.
    size, ranks = parameter.ds_tensor.numel(), torch.distributed.get_world_size()
    padded = nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    own = padded.narrow(0, size * torch.distributed.get_rank(), size)
    if moment is None:
        safe_set_local_fp32_param(parameter, own)
    else:
        safe_set_local_optimizer_state(parameter, own, moment)


@torch.no_grad()
def clamp_trained(parameters: Sequence[nn.Parameter], low: float, high: Sequence[float]) -> None:
    """Clamp trained parameters in place, each to [low, its entry of ``high``]: masters and what the forward pass reads.

    No collective: bounds are single numbers, so every rank clamps whatever part it holds. ``high`` must be exact in the
    parameters' dtype; then no rounding of a master carries what the forward pass reads over it.
    """
    copies: list[tuple[torch.Tensor, float]] = []
    masters: list[tuple[torch.Tensor, float]] = []
    fetched: list[tuple[nn.Parameter, torch.Tensor]] = []
    for parameter, limit in zip(parameters, high, strict=True):
        copies.append((parameter.data, limit))
        if hasattr(parameter, "ds_tensor"):
            copies.append((parameter.ds_tensor.data, limit))
        if hasattr(parameter, "_z3_optimizer"):
            from deepspeed.utils import safe_get_local_fp32_param

            fetched.append((parameter, safe_get_local_fp32_param(parameter)))
            masters.append((fetched[-1][1], limit))
        elif getattr(parameter, "_hp_mapping", None) is not None:  # None: another rank has all of it
            masters.append((parameter._hp_mapping.get_hp_fragment(), limit))
    for held in (copies, masters):
        tensors = [tensor for tensor, _ in held if tensor.numel()]
        if tensors:
            torch._foreach_clamp_max_(tensors, [limit for tensor, limit in held if tensor.numel()])
            torch._foreach_clamp_min_(tensors, low)
    for parameter, master in fetched:  # a copy where the optimiser is offloaded
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, master)
