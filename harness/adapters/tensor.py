"""FLoRA and LoRA on convolutions for any `nn.Module`: attach, train, merge, save, load, remove.

    from harness.adapters import tensor

    tensor.attach(model, rank=16, kernel_rank=2, also_train=["head"])
    ...                                    # train: only the adapter and the head have requires_grad
    tensor.save(model, folder)             # adapter_model.safetensors, adapter_config.json
    tensor.merge(model); tensor.remove(model)

The model is changed in place and stays of its class: every adapted layer is replaced by one that holds it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from harness.adapters.tensor_forms import CONFIG, WEIGHTS, Form, Init, Layout, Reshaped, Tucker, read_form, write_form
from harness.adapters.tensor_layers import LAYERS, TensorLayer
from harness.data.sampling import seed_for
from harness.errors import UserError
from harness.files import read_json
from harness.models.targets import is_convolution, layer_of

ADAPTER = "default"
Targets = Literal["all", "all-linear", "all-conv"] | Sequence[str]


def attach(
    model: nn.Module,
    rank: int | tuple[int, int] = 16,
    kernel_rank: int | None = None,
    scale: float = 1.0,
    target_modules: Targets = "all",
    also_train: Sequence[str] = (),
    method: Literal["flora", "lora_conv"] = "flora",
    init: Init = "fan_in",
    layout: Layout = "reshape",
    seed: int = 0,
) -> nn.Module:
    """Give ``model`` a trainable adapter and freeze everything else; it computes what it did before.

    Args:
        rank: r₁ = r₂, or (r₁, r₂) of outputs and inputs; for ``lora_conv`` the rank of the matrix. A rank above the
            size of its mode in some layer is that size there.
        kernel_rank: r₃ of every kernel axis (FLoRA), clipped in the same way; 2 where it is not given.
        scale: s of W + s·ΔW.
        target_modules: ``all`` linear layers and convolutions, ``all-linear``, ``all-conv``, or names: full ones, or
            their last parts.
        also_train: modules, by name, that stay trainable as they are, such as a new head. They get no adapter, and are
            saved with it.
        init, layout: see `harness.adapters.tensor_forms`.
        seed: of the random tensors; each layer's depend on its name besides.

    Returns:
        The same model.

    Raises:
        UserError: nothing matches, the model has an adapter already, or r₃ is above every kernel.
    """
    form: Form = Tucker(rank, kernel_rank, init)
    if method == "lora_conv":
        if not isinstance(rank, int) or kernel_rank is not None:
            raise UserError("rank: lora_conv has one rank and no kernel_rank; give rank alone")
        form = Reshaped(rank, layout)
    return _attach(model, form, scale, _targets(model, target_modules, also_train), also_train, seed)


def adapted_layers(model: nn.Module) -> dict[str, TensorLayer]:
    """The layers with an adapter, by the name that they had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TensorLayer)}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """How many numbers the adapter of each layer trains."""
    return {
        name: sum(tensor.numel() for tensor in layer.tensors(ADAPTER).values())
        for name, layer in adapted_layers(model).items()
    }


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes without its adapter."""
    layers = list(adapted_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge(model: nn.Module) -> None:
    """Add s·ΔW to every adapted weight; the model then computes without the factored path."""
    for layer in adapted_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Take s·ΔW out of the weights again."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def remove(model: nn.Module) -> nn.Module:
    """Put the layers back that the adapter stood around, merged or not. What was frozen stays frozen."""
    for layer in adapted_layers(model).values():
        _replace(model, layer, layer.get_base_layer())
    return model


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter and what was trained besides it: ``adapter_model.safetensors``, ``adapter_config.json``."""
    layers = adapted_layers(model)
    if not layers:
        raise UserError("adapter: the model has none; attach one first")
    inside = {id(tensor) for layer in layers.values() for tensor in layer.tensors(ADAPTER).values()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
    tensors = {f"{name}.{k}": t for name, layer in layers.items() for k, t in layer.tensors(ADAPTER).items()}
    first = next(iter(layers.values()))
    write_form(Path(folder), first.form, first.scaling[ADAPTER], tensors | trained, list(layers), trained=list(trained))


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attach the adapter that `save`, or the export of a run, wrote, and put back what was trained besides it.

    Raises:
        UserError: the folder holds no such adapter, or the model does not have its layers in their shapes.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"adapter: {folder} has no {CONFIG}; give a folder that tensor.save wrote")
    content, tensors = read_json(folder / CONFIG), load_file(folder / WEIGHTS)
    modules = dict(model.named_modules())
    missing = [name for name in content["target_modules"] if name not in modules]
    if missing:
        raise UserError(f"adapter: {folder} is for a layer {missing[0]!r}, which the model does not have")
    trained = {name: tensors.pop(name) for name in content["trained"]}
    form = read_form(content)
    _check_shapes(folder, form, {name: modules[name] for name in content["target_modules"]}, tensors)
    _attach(model, form, content["scaling"], {n: modules[n] for n in content["target_modules"]}, (), None)
    parameters = dict(model.named_parameters())
    for name, layer in adapted_layers(model).items():
        for key, parameter in layer.tensors(ADAPTER).items():
            _copy(parameter, tensors[f"{name}.{key}"])
    for name, tensor in trained.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(f"adapter: {folder} has {name} {tuple(tensor.shape)}, which the model does not have")
        _copy(parameters[name].requires_grad_(True), tensor)
    return model


def _attach(
    model: nn.Module,
    form: Form,
    scale: float,
    targets: Mapping[str, nn.Module],
    also_train: Sequence[str],
    seed: int | None,
) -> nn.Module:
    """``seed`` None: tensors are loaded afterwards."""
    if adapted_layers(model):
        raise UserError("adapter: the model has one already; remove it first")
    if not math.isfinite(scale) or scale <= 0:
        raise UserError(f"scale: {scale} given; allowed: a positive number")
    form.check([layer_of(name, module) for name, module in targets.items()], "kernel_rank")
    model.requires_grad_(False)
    config = LoraConfig(r=1, lora_alpha=scale)
    for name, module in targets.items():
        layer = LAYERS[type(form)](module, ADAPTER, config=config, form=form, r=1, lora_alpha=scale)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed_for(form.name, seed, name))
            for key, tensor in form.start(layer.layer, generator).items():
                _copy(layer.tensors(ADAPTER)[key], tensor)
        layer.train(module.training)
        _replace(model, module, layer)
    for name in also_train:
        model.get_submodule(name).requires_grad_(True)
    return model


def _targets(model: nn.Module, targets: Targets, also_train: Sequence[str]) -> dict[str, nn.Module]:
    """The layers to adapt, by name; those that ``also_train`` covers left out."""
    modules = dict(model.named_modules())
    for name in also_train:
        if name not in modules:
            raise UserError(f"also_train: {name!r} is no module of the model")
    # torch's attention reads the weights of its own projections, past the layers' forward.
    closed = [name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    left_out = [*also_train, *closed]
    possible = {
        name: module
        for name, module in modules.items()
        if (isinstance(module, nn.Linear) or is_convolution(module))
        and name
        and not any(name == other or name.startswith(f"{other}.") for other in left_out)
    }
    if isinstance(targets, str):
        wanted = {"all": possible, "all-linear": {}, "all-conv": {}}.get(targets)
        if wanted is None:
            raise UserError(
                f"target_modules: {targets!r} given; allowed: all, all-linear, all-conv, or a list of names"
            )
        if targets != "all":
            wanted = {n: m for n, m in possible.items() if is_convolution(m) == (targets == "all-conv")}
    else:
        wanted = {}
        for target in targets:
            matches = {n: m for n, m in possible.items() if n == target or n.endswith(f".{target}")}
            if not matches:
                raise UserError(
                    f"target_modules: {target!r} matches no linear layer or convolution that can be adapted; allowed: "
                    f"all, all-linear, all-conv or any of {', '.join(sorted({n.rsplit('.', 1)[-1] for n in possible}))}"
                )
            wanted |= matches
    if not wanted:
        raise UserError(f"target_modules: {targets!r} given; the model has no such layer inside it")
    return {name: module for name, module in possible.items() if name in wanted}


def _check_shapes(
    folder: Path, form: Form, modules: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]
) -> None:
    for name, module in modules.items():
        if not (isinstance(module, nn.Linear) or is_convolution(module)):
            raise UserError(
                f"adapter: {folder} is for a layer {name!r}, which is no linear layer and no convolution here"
            )
        for key, shape in form.shapes(layer_of(name, module)).items():
            found = tensors.get(f"{name}.{key}")
            if found is None or found.shape != shape:
                has = "no" if found is None else tuple(found.shape)
                raise UserError(f"adapter: {folder} has {has} {name}.{key}, the model's layer needs {shape}")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands: a module may be used in several places."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


@torch.no_grad()
def _copy(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.copy_(value)
