"""Which layers are adapted, and where they stand."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from harness.config import ModelConfig
from harness.errors import UserError

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OWN_FORWARD = {convolution.forward for convolution in CONVOLUTIONS}


@dataclass(frozen=True)
class Layer:
    """A target layer: its dotted module name and the shape of its weight, ``(out_features, in_features, *kernel)``.

    For a convolution ``in_features`` are the channels that one group reads.
    """

    name: str
    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.out_features, self.in_features, *self.kernel)


def adapted_modules(model: nn.Module, config: ModelConfig, convolutions: bool = False) -> dict[str, nn.Module]:
    """The layers that a run adapts: `target_modules` as configured, without modules that are trained in full.

    Raises:
        UserError: as `target_modules`.
    """
    return target_modules(model, config.target_modules, convolutions, config.trained_modules)


def target_modules(
    model: nn.Module,
    targets: Literal["all-linear"] | list[str],
    convolutions: bool = False,
    left_out: Sequence[str] = (),
) -> dict[str, nn.Module]:
    """The target layers of ``model`` by dotted name, in the order in which the model defines them.

    ``all-linear`` is every `nn.Linear` but the output embedding and the head of a task, as in PEFT. A list holds full
    names or their last parts (``q_proj``); it may name convolutions where the method has a form for them
    (``convolutions``). Nothing in the modules ``left_out`` is a target.

    Raises:
        UserError: an entry of the list matches no layer, or a convolution where only linear layers are adapted; the
            message names the nearest.
    """
    get_output = getattr(model, "get_output_embeddings", lambda: None)
    output = get_output()
    named = {
        n: m for n, m in model.named_modules() if not any(_named(part, o) for o in left_out for part in _within(n))
    }
    linear = {n: m for n, m in named.items() if isinstance(m, nn.Linear) and m is not output}
    if targets == "all-linear":
        body = _body_prefix(model)
        linear = {n: m for n, m in linear.items() if n.startswith(body)}
        if not linear:
            raise UserError("model.target_modules: the model has no torch.nn.Linear layers; all-linear finds none")
        return linear
    convolved = {n: m for n, m in named.items() if is_convolution(m)}
    allowed = linear | convolved if convolutions else linear
    chosen: set[str] = set()
    for target in targets:
        matches = {name for name in allowed if _named(name, target)}
        if not matches:
            if any(_named(name, target) for name in convolved):
                raise UserError(
                    f"model.target_modules: {target!r} is a convolution, for which this method has no form; use method "
                    "flora or lora_conv, or name linear layers"
                )
            known = sorted({name.rsplit(".", 1)[-1] for name in allowed})
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            kinds = "linear layer and no convolution" if convolutions else "linear layer"
            raise UserError(
                f"model.target_modules: {target!r} matches no {kinds}; allowed: all-linear or any of "
                f"{', '.join(known)}{hint}"
            )
        chosen |= matches
    return {name: module for name, module in model.named_modules() if name in chosen}


def _body_prefix(model: nn.Module) -> str:
    """What the names of a model's own layers begin with, where others are the head that a task put on it."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _within(name: str) -> Iterator[str]:
    """The name itself and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution that computes as torch's do: one that pads or scales by itself is not."""
    return isinstance(module, CONVOLUTIONS) and type(module).forward in _OWN_FORWARD


def layer_of(name: str, module: nn.Module) -> Layer:
    """Name and shape of a linear layer or a convolution, read where ZeRO-3 leaves them."""
    if isinstance(module, CONVOLUTIONS):
        return Layer(
            name, module.out_channels, module.in_channels // module.groups, tuple(module.kernel_size), module.groups
        )
    return Layer(name, module.out_features, module.in_features)


def describe(modules: dict[str, nn.Module]) -> list[Layer]:
    """Names and shapes of target modules."""
    return [layer_of(name, module) for name, module in modules.items()]


def place(name: str) -> tuple[int | None, str]:
    """``(depth, module type)`` of a dotted layer name: ``model.layers.3.mlp.up_proj`` → ``(3, "mlp.up_proj")``.

    The depth is the first number in the name, the index of the decoder block; None where there is none.
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else (None, name)


def depth_of(name: str) -> int | None:
    """The index of the decoder block that a layer lies in, from its dotted name; None where there is none."""
    return place(name)[0]


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
