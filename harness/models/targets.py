"""Which linear layers are adapted, and where they stand."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from harness.errors import UserError


@dataclass(frozen=True)
class Layer:
    """A target layer: its dotted module name and the shape of its weight, ``(out_features, in_features)``."""

    name: str
    out_features: int
    in_features: int


def target_modules(model: nn.Module, targets: Literal["all-linear"] | list[str]) -> dict[str, nn.Linear]:
    """The target layers of ``model`` by dotted name, in the order in which the model defines them.

    ``all-linear`` is every `nn.Linear` but the output embedding, as in PEFT. A list holds full names or their
    last parts (``q_proj``).

    Raises:
        UserError: an entry of the list matches no linear layer; the message names the nearest.
    """
    get_output = getattr(model, "get_output_embeddings", lambda: None)
    output = get_output()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output}
    if targets == "all-linear":
        if not linear:
            raise UserError("model.target_modules: the model has no torch.nn.Linear layers; all-linear finds none")
        return linear
    chosen: set[str] = set()
    for target in targets:
        matches = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matches:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(
                f"model.target_modules: {target!r} matches no linear layer; allowed: all-linear or any of "
                f"{', '.join(known)}{hint}"
            )
        chosen |= matches
    return {name: module for name, module in linear.items() if name in chosen}


def describe(modules: dict[str, nn.Linear]) -> list[Layer]:
    """Names and shapes of target modules."""
    return [Layer(name, module.out_features, module.in_features) for name, module in modules.items()]


def place(name: str) -> tuple[int | None, str]:
    """``(depth, module type)`` of a dotted layer name: ``model.layers.3.mlp.up_proj`` → ``(3, "mlp.up_proj")``.

    The depth is the first number in the name, the index of the decoder block; None where there is none.
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else (None, name)


def depth_of(name: str) -> int | None:
    """The index of the decoder block that a layer lies in, from its dotted name; None where there is none."""
    return place(name)[0]
