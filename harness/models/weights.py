"""The weights of a base model, read from its safetensors files one at a time: no process holds the whole model.

`empty_model` has the modules without their weights (on torch's ``meta`` device); `BaseWeights` reads one weight by the
name of its parameter, as `harness.models.loading.load_model` would load it.

Warning:
    Some architectures stack weights while they load (experts of a mixture). What is not found in the files, also not
    under another name (`harness.models.stored_names`), makes `BaseWeights` load the model whole, once, and say so.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from harness.config import ModelConfig
from harness.console import say
from harness.errors import UserError
from harness.files import tensor_checksum
from harness.models.loading import auto_class, described_model, load_model, whole_weights
from harness.models.stored_names import parameter_names


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """The base model in evaluation mode, its weights on the meta device, its buffers (rotary frequencies) real.

    Raises:
        UserError: the path is neither a model folder nor a reachable hub id, or the model is none for the task.
    """
    described = described_model(config.path, config.task)
    with whole_weights(), init_empty_weights(include_buffers=False):
        model = auto_class(config.task).from_config(
            described, dtype=getattr(torch, config.dtype), trust_remote_code=False
        )
    model.tie_weights()
    return model.eval()


class BaseWeights:
    """Reads weights of the base model, mapped from disk and not kept.

    A file is opened for every read: what one mapping has touched counts as this process's memory until it is closed.
    """

    def __init__(self, config: ModelConfig, model: PreTrainedModel) -> None:
        """``model``: the same model, with or without weights; it says how parameters are called and tied.

        Raises:
            UserError: there are no safetensors files, or one is damaged.
        """
        self._config = config
        self._dtype = getattr(torch, config.dtype)
        self._model = model
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, torch.Size] = {}
        folder = model_folder(config.path)
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    keys = opened.keys()
                    self._shapes |= {key: torch.Size(opened.get_slice(key).get_shape()) for key in keys}
                    self._files |= dict.fromkeys(keys, file)
            except Exception as error:  # safetensors has its own exception type, not exported
                raise UserError(f"model.path: {file} is damaged: {error}") from error
        if not self._files:
            raise UserError(f"model.path: {config.path} has no safetensors weights; save it with save_pretrained")
        # Parameter → the name under which the files have it; found here, while the model has all of its modules.
        self._stored = {parameter: name for name, parameter in parameter_names(model, self._files).items()}

    @cached_property
    def complete(self) -> bool:
        """Whether every weight of the model is a parameter that `read` finds in the files, as transformers loads it.

        Else something is stored under another name, or is a buffer that the files hold, or keeps a dtype of its own.
        """
        model = self._model
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        own_dtype = bool(model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict)
        return (
            all(self._key(name) is not None for name in parameters)
            and model.state_dict().keys() <= parameters
            and (self._dtype == torch.float32 or not own_dtype)
        )

    def read(self, parameter: str) -> torch.Tensor:
        """The parameter of that dotted name (``model.layers.0.mlp.up_proj.weight``), in ``model.dtype``, on the CPU."""
        key = self._key(parameter)
        if key is None:
            return self._whole[parameter]
        with safe_open(self._files[key], framework="pt") as opened:
            return opened.get_tensor(key).to(self._dtype)

    def checksum(self, parameter: str) -> str:
        """SHA-256 of the parameter's dtype, shape and bytes as `read` gives it."""
        return tensor_checksum(self.read(parameter))

    def _key(self, parameter: str) -> str | None:
        """The name under which the files have the parameter; None where they have none for it."""
        for own in (parameter, *self._tied(parameter)):
            name = self._stored.get(own)
            if name is not None and self._shapes[name] == self._model.get_parameter(parameter).shape:
                return name
        return None

    def _tied(self, parameter: str) -> list[str]:
        """Other names of the very same parameter (an output embedding that is the input embedding)."""
        own = self._model.get_parameter(parameter)
        return [n for n, p in self._model.named_parameters(remove_duplicate=False) if p is own and n != parameter]

    @cached_property
    def _whole(self) -> dict[str, torch.Tensor]:
        say(
            f"model.path: {self._config.path} stores some weights otherwise than the model holds them; the model is "
            "loaded whole"
        )
        with whole_weights():
            return load_model(self._config).state_dict(keep_vars=False)


def fill(module: nn.Module, prefix: str, weights: BaseWeights, device: torch.device) -> None:
    """Put weights into every parameter of ``module``, called ``prefix`` in the model, that is on the meta device."""
    _replace(
        module,
        lambda name, old: weights.read(f"{prefix}.{name}" if prefix else name).to(device) if old.is_meta else old.data,
    )


def empty(module: nn.Module) -> None:
    """Put every parameter of ``module`` back on the meta device: its memory is free again."""
    _replace(module, lambda name, old: old.data.to("meta"))


def _replace(module: nn.Module, value: Callable[[str, nn.Parameter], torch.Tensor]) -> None:
    """Give every parameter a new, frozen one in its place; parameters that were one stay one."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if old not in new:
            new[old] = nn.Parameter(value(name, old), requires_grad=False)
        owner, _, child = name.rpartition(".")
        setattr(module.get_submodule(owner), child, new[old])


def model_folder(path: str) -> Path:
    """The folder of a base model: ``path`` itself, or the local copy of a hub id, fetched where it is not here yet.

    Raises:
        UserError: the hub cannot be reached or does not know it.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except OSError as error:
        raise UserError(f"model.path: {path!r} cannot be loaded: {' '.join(str(error).split())}") from error
