"""Which layers are adapted, and where they stand."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import nn

from harness.config import PROJECTOR, ModelConfig
from harness.console import say
from harness.errors import UserError

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What transformers calls the parts of vision-language models.
LANGUAGE_MODEL = "language_model"
VISION_TOWERS = ("vision_tower", "visual", "vision_model", "image_tower")
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
    projector = config.projector == "adapted"
    return target_modules(model, config.target_modules, convolutions, config.trained_modules, projector)


def quantised_modules(model: nn.Module, config: ModelConfig) -> dict[str, nn.Linear]:
    """The layers whose frozen weights are quantised: what ``all-linear`` names, adapted or not, and what is adapted."""
    projector = config.projector == "adapted"
    every = target_modules(model, "all-linear", left_out=config.trained_modules, projector=projector)
    adapted = adapted_modules(model, config, convolutions=True)
    linear = {n for n, m in (every | adapted).items() if isinstance(m, nn.Linear)}
    return {n: m for n, m in model.named_modules() if n in linear and isinstance(m, nn.Linear)}


def target_modules(
    model: nn.Module,
    targets: Literal["all-linear", "all-conv", "all-linear+conv"] | list[str],
    convolutions: bool = False,
    left_out: Sequence[str] = (),
    projector: bool = False,
) -> dict[str, nn.Module]:
    """The target layers of ``model`` by dotted name, in the order in which the model defines them.

    ``all-linear`` is every `nn.Linear` but the output embedding and the head of a task, as in PEFT; ``all-conv`` every
    convolution; ``all-linear+conv`` both. A list holds full names or their last parts (``q_proj``). Convolutions may be
    named where the method has a form for them (``convolutions``). Nothing in the modules ``left_out`` is a target.

    Of a model that reads images too, ``all-linear`` and the like stand for its language model, and with ``projector``
    for its projector as well. A last part in a list (``q_proj``) stands for layers of the vision tower only where no
    other layer has that name; that is said.

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
    convolved = {n: m for n, m in named.items() if is_convolution(m)}
    if isinstance(targets, str):
        return _every(model, targets, linear if "linear" in targets else {}, convolved, convolutions, projector)
    allowed = linear | convolved if convolutions else linear
    chosen: set[str] = set()
    # In a model that has no tower no name begins with this.
    tower = f"{vision_tower(model)}." if language_model(model) is not None else "."
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
        beside = {name for name in matches if not name.startswith(tower)}
        if not beside:
            _say_once(f"model.target_modules: {target!r} is in the vision tower, which is adapted there as asked for")
        chosen |= beside or matches
    return {name: module for name, module in model.named_modules() if name in chosen}


def _every(
    model: nn.Module,
    targets: str,
    linear: dict[str, nn.Module],
    convolved: dict[str, nn.Module],
    convolutions: bool,
    projector: bool,
) -> dict[str, nn.Module]:
    """The layers that ``all-linear``, ``all-conv`` or ``all-linear+conv`` stands for, in the model's order."""
    if "conv" in targets and not convolutions:
        raise UserError(
            f"model.target_modules: {targets} given, and this method has no form for convolutions; use method flora or "
            "lora_conv, or all-linear"
        )
    chosen = linear | (convolved if "conv" in targets else {})
    bodies = (_body_prefix(model),)
    if (language := language_model(model)) is not None:
        parts = [part for part in (language, projector_of(model) if projector else None) if part is not None]
        bodies = tuple(f"{part}." for part in parts)
    found = {n: m for n, m in model.named_modules() if n in chosen and n.startswith(bodies)}
    if not found:
        kinds = {"all-linear": "torch.nn.Linear layers", "all-conv": "convolutions"}
        raise UserError(
            f"model.target_modules: the model has no {kinds.get(targets, 'such layers')}; {targets} finds none"
        )
    return found


def language_model(model: nn.Module) -> str | None:
    """The dotted name of the language model in a model that reads images too; None of any other."""
    found = _part(model, LANGUAGE_MODEL)
    return found if found is not None and vision_tower(model) is not None else None


def vision_tower(model: nn.Module) -> str | None:
    """The dotted name of what turns images into features, in a model that has a language model beside it."""
    return next((name for part in VISION_TOWERS if (name := _part(model, part)) is not None), None)


def projector_of(model: nn.Module) -> str | None:
    """The dotted name of what turns features of images into what a language model reads; None where there is none."""
    return _part(model, PROJECTOR)


def reads_images(layer: str) -> bool:
    """Whether a layer of that dotted name reads features of images and not tokens, in a vision-language model."""
    return bool({PROJECTOR, *VISION_TOWERS} & set(layer.split(".")))


def freeze_vision(model: nn.Module, config: ModelConfig) -> None:
    """Freeze the vision tower, and the projector unless that is trained: for what trains a whole model.

    Nothing in a model of one part.
    """
    parts = [vision_tower(model), projector_of(model) if config.projector != "full" else None]
    if language_model(model) is not None:
        for part in filter(None, parts):
            model.get_submodule(part).requires_grad_(False)


def _part(model: nn.Module, name: str) -> str | None:
    """The dotted name of the outermost module called ``name``, no deeper than a model's body."""
    return next((n for n, _ in model.named_modules() if _named(n, name) and n.count(".") < 2), None)


@cache
def _say_once(line: str) -> None:
    say(line)


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
