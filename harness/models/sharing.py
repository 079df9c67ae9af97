"""Groups of layers that read the same input: one statistic serves them all (q, k, v; gate, up)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def input_groups(
    model: Callable[..., Any], modules: Mapping[str, nn.Linear], probe: Mapping[str, Any]
) -> dict[str, str]:
    """Map each target layer to the first target layer that read the very same tensor.

    Sharing is seen, not guessed from names: one forward pass over ``probe`` (a few tokens) records which tensor
    object each layer receives; all inputs of that pass are kept alive, so no two can have the same identity.

    Args:
        model: the model, or anything that runs ``modules`` when it is called.
        modules: target layers by name.
        probe: keyword arguments of the model's forward for one short row.

    Returns:
        name → name of its group's first layer. A layer that the probe never reached stands alone.
    """
    seen: dict[tuple[int, int], str] = {}
    alive: list[torch.Tensor] = []
    groups = {name: name for name in modules}
    called: set[str] = set()

    def record(name: str, tensor: torch.Tensor) -> None:
        if name in called:  # what it reads besides is no token's (see `harness.statistics.collector`)
            return
        called.add(name)
        # The version tells a tensor from what an operation in place made of it between two layers.
        groups[name] = seen.setdefault((id(tensor), tensor._version), name)
        alive.append(tensor)

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
        for name, module in modules.items()
    ]
    try:
        model(**probe)
    finally:
        for handle in handles:
            handle.remove()
    return groups
