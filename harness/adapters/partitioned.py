"""Reading and writing whole parameters, whether or not ZeRO has divided them, or their fp32 masters, over the ranks.

A parameter that is trained under DeepSpeed stands in two places: what the forward pass reads, and its fp32 master, from
which every optimiser step writes the former anew. Without DeepSpeed the parameter itself is all there is.
"""

from collections.abc import Iterable, Iterator
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
