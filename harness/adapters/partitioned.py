"""Reading and writing whole parameters, whether or not ZeRO-3 has partitioned them over the ranks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter], write: bool = False) -> Iterator[None]:
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
