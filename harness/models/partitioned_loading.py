"""The base model that is trained, filled one weight at a time: no rank holds more than it has to.

Under ZeRO-3 every parameter is divided over the ranks as soon as it is read. transformers, left to itself, reads the
whole state dict into every rank's memory before it divides anything. An NF4 base is quantised layer by layer, with or
without ZeRO-3, so its dense weights never stand whole beside each other.

Warning:
    Where the files do not have every weight under the name of its parameter (see `harness.models.weights`), the model
    is loaded as transformers loads it, whole on every rank for a moment.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import distributed, nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as configured

from harness.config import ModelConfig
from harness.console import say
from harness.models.loading import load_model, whole_weights
from harness.models.quantisation import quantise_linears, quantised_layer, replace_module, residual_weight
from harness.models.targets import quantised_modules
from harness.models.weights import BaseWeights, empty_model

if TYPE_CHECKING:
    from harness.methods.base import LowRank


def load_trained(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The base model on ``device``, whole; under an active ZeRO-3 configuration divided over the ranks.

    Collective under ZeRO-3: rank 0 reads a parameter, all ranks receive it, keep their part and free the rest.

    Raises:
        UserError: as `harness.models.loading.load_model`.
    """
    if not configured.is_deepspeed_zero3_enabled():
        return load_model(config, device)
    model = empty_model(config)
    weights = BaseWeights(config, model)
    if not weights.complete:
        _say_whole(config)
        return load_model(config)
    _fill(model, weights, device, Divider())
    return model


def load_quantised(config: ModelConfig, subtracted: Mapping[str, "LowRank"], device: torch.device) -> PreTrainedModel:
    """The base with NF4 residual weights on ``device``; under ZeRO-3 packed weights are divided as they are made.

    Every rank reads and quantises every layer, one at a time: the blocks' scales, a sixty-fourth of the numbers, stay
    whole on each.

    Raises:
        UserError: as `harness.models.loading.load_model`.
    """
    dtype, double = getattr(torch, config.dtype), config.double_quantization
    model = empty_model(config)
    weights = BaseWeights(config, model)
    if not weights.complete:
        _say_whole(config)
        with whole_weights():
            model = load_model(config)
        quantise_linears(model, quantised_modules(model, config), subtracted, dtype, double, device)
        return model.to(device)
    divider = Divider() if configured.is_deepspeed_zero3_enabled() else None
    for name, linear in quantised_modules(model, config).items():
        dense = weights.read(f"{name}.weight").to(device)
        layer = quantised_layer(linear, residual_weight(dense, subtracted.get(name), dtype), dtype, double)
        replace_module(model, name, layer)
        if divider is not None:
            divider.divide(layer.weight)
    model.is_loaded_in_4bit = True
    _fill(model, weights, device, divider)
    return model


@torch.no_grad()
def cast_undivided(model: nn.Module, dtype: torch.dtype) -> None:
    """Make parameters that are not divided yet (adapters) ``dtype``, where others are.

    The engine does this to all parameters, as under ZeRO 1 and 2, unless it is given some that are divided.
    """
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        for parameter in parameters:
            if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


class Divider:
    """Divides parameters over the ranks as ZeRO-3 does, one by one, under transformers' active configuration."""

    def __init__(self) -> None:
        self._first: nn.Parameter | None = None

    def divide(self, parameter: nn.Parameter) -> None:
        """Keep this rank's part of rank 0's value, on the device that the configuration names. Collective."""
        if self._first is None:
            import deepspeed

            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=configured.deepspeed_config())
            self._first = parameter
        else:
            # As the engine divides adapters: by the settings of a parameter that is divided already.
            self._first.convert_to_zero_parameters(param_list=[parameter])


@torch.no_grad()
def _fill(model: nn.Module, weights: BaseWeights, device: torch.device, divider: Divider | None) -> None:
    """Put weights into every parameter on the meta device, and buffers on ``device``. Tied parameters stay one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            names.setdefault(parameter, []).append(name)
    for old, own in names.items():
        reads = divider is None or distributed.get_rank() == 0
        value = weights.read(own[0]).to(device) if reads else torch.empty_like(old, device=device)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        for name in own:
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, new)
        if divider is not None:
            divider.divide(new)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _say_whole(config: ModelConfig) -> None:
    say(
        f"model.path: {config.path} stores some weights otherwise than the model holds them; every rank loads it whole "
        "for a moment"
    )
