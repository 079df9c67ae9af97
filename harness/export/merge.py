"""Merged checkpoints: the original base with the update added, written shard by shard."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, GenerationConfig
from transformers.utils import cached_file

from harness.config import ModelConfig, TaskName
from harness.console import progress
from harness.errors import UserError
from harness.export.shards import INDEX, SHARD_BYTES, ShardWriter, read_file, read_tensors
from harness.files import read_json
from harness.methods.base import LowRank, Update
from harness.models.loading import load_tokenizer
from harness.models.quantisation import nf4_values, residual_weight
from harness.models.stored_names import parameter_names
from harness.models.targets import quantised_modules
from harness.models.weights import empty_model

SINGLE = "model.safetensors"


def write_merged(
    folder: Path,
    base_model: str,
    dtype: torch.dtype,
    updates: Mapping[str, Update],
    replaced: Mapping[str, torch.Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
    task: TaskName = "causal_lm",
) -> None:
    """Write base + updates to ``folder`` with configuration and tokenizer, one tensor in memory at a time.

    Sums are taken in fp32 and rounded once, to ``dtype``. ``replaced``: tensors of the base, by name, that were trained
    themselves. Tensors keep the names that the base's files have for them, so that what reads the base reads this.

    Raises:
        UserError: the base has no safetensors files, or what was trained is not among their tensors.
    """
    waiting: dict[str, Update | torch.Tensor] = {f"{name}.weight": update for name, update in updates.items()}
    waiting |= replaced or {}
    writer = ShardWriter(folder, shard_bytes)
    names = module_names(base_model, waiting, task)
    for name, tensor in progress(base_tensors(base_model), "merge"):
        trained = waiting.pop(names.get(name, name), None)
        if isinstance(trained, torch.Tensor):
            tensor = trained
        elif trained is not None:
            tensor = tensor.float()
            tensor = tensor + trained.dense(tensor).float()
        writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if waiting:
        raise UserError(
            f"model.path: {base_model} stores no tensor called {min(waiting)}; its files do not have it by itself "
            "under another name either, which merging shard by shard does not cover"
            + ("; use adapter/ instead" if updates else "")
        )
    writer.close()
    write_companions(folder, base_model, dtype, task)


def write_frozen(folder: Path, config: ModelConfig, subtracted: Mapping[str, LowRank], device: torch.device) -> None:
    """Write the frozen base of a quantised run to ``folder``: NF4 values of W − s·B·A, dequantised, in its dtype.

    Quantised again on ``device``, where training ran, tensor by tensor: the same values that training computed with.
    """
    base_model, dtype, double = config.path, getattr(torch, config.dtype), config.double_quantization
    linear = {f"{name}.weight": name for name in quantised_modules(empty_model(config), config)}
    names = module_names(base_model, linear, config.task)
    writer = ShardWriter(folder)
    for key, tensor in progress(base_tensors(base_model), "dequantise"):
        layer = linear.pop(names.get(key, key), None)
        if layer is not None:
            tensor = nf4_values(residual_weight(tensor.to(dtype).to(device), subtracted.get(layer), dtype), double)
        writer.add(key, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if linear:
        raise UserError(
            f"model.path: {base_model} stores no tensor called {min(linear)}; its files do not have it by itself "
            "under another name either, which dequantising shard by shard does not cover; use model.quantization: none"
        )
    writer.close()
    write_companions(folder, base_model, dtype, config.task)


def write_companions(folder: Path, base_model: str, dtype: torch.dtype, task: TaskName = "causal_lm") -> None:
    """Configuration and, of a model that generates, its generation configuration, and the tokenizer or processor.

    The folder then loads by itself.
    """
    config = AutoConfig.from_pretrained(base_model, trust_remote_code=False)
    config.dtype = dtype
    config.save_pretrained(folder)
    if task != "causal_lm":
        AutoProcessor.from_pretrained(base_model, trust_remote_code=False).save_pretrained(folder)
    if task not in ("causal_lm", "image_text"):
        return
    try:
        GenerationConfig.from_pretrained(base_model).save_pretrained(folder)
    except OSError:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    if task == "causal_lm":
        load_tokenizer(base_model).save_pretrained(folder)


def cast_model(source: Path, folder: Path, base_model: str, dtype: torch.dtype, task: TaskName = "causal_lm") -> None:
    """A fully fine-tuned model from its fp32 checkpoint, in ``dtype``, with configuration and tokenizer."""
    writer = ShardWriter(folder)
    for name, tensor in read_tensors(source):
        writer.add(name, tensor.to(dtype))
    writer.close()
    write_companions(folder, base_model, dtype, task)


def module_names(base_model: str, wanted: Iterable[str], task: TaskName) -> dict[str, str]:
    """Name in the base's files → name in the model; empty where ``wanted`` names of the model stand in the files."""
    stored = base_names(base_model)
    if set(wanted) <= stored:
        return {}
    config = ModelConfig(path=base_model)
    config._task = task
    return parameter_names(empty_model(config), stored)


def base_names(base_model: str) -> set[str]:
    """The names of all tensors in the base model's safetensors files.

    Raises:
        UserError: there are no safetensors files.
    """
    found: set[str] = set()
    for file in _base_files(base_model):
        with safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


def base_tensors(base_model: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the base model's safetensors files, in the order of files.

    Raises:
        UserError: there are no safetensors files.
    """
    for file in _base_files(base_model):
        yield from read_file(file)


def _base_files(base_model: str) -> Iterator[Path]:
    options = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(base_model, INDEX, **options)
    for file in [SINGLE] if index is None else sorted(set(read_json(Path(index))["weight_map"].values())):
        path = cached_file(base_model, file, **options)
        if path is None:
            raise UserError(f"model.path: {base_model} has no {file}; convert its weights to safetensors first")
        yield Path(path)
