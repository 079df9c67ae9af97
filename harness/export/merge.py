"""Merged checkpoints: the original base with the update added, written shard by shard."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import cached_file

from harness.console import progress
from harness.errors import UserError
from harness.export.shards import INDEX, SHARD_BYTES, ShardWriter, read_file, read_tensors
from harness.files import read_json
from harness.methods.base import LowRank, Update
from harness.models.loading import load_tokenizer, whole_weights
from harness.models.quantisation import nf4_values, residual_weight
from harness.models.targets import target_modules

SINGLE = "model.safetensors"


def write_merged(
    folder: Path,
    base_model: str,
    dtype: torch.dtype,
    updates: Mapping[str, Update],
    replaced: Mapping[str, torch.Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write base + updates to ``folder`` with configuration and tokenizer, one tensor in memory at a time.

    Sums are taken in fp32 and rounded once, to ``dtype``. ``replaced``: tensors of the base, by name, that were trained
    themselves.

    Raises:
        UserError: the base has no safetensors files, or what was trained is not among their tensors.
    """
    waiting: dict[str, Update | torch.Tensor] = {f"{name}.weight": update for name, update in updates.items()}
    waiting |= replaced or {}
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in progress(base_tensors(base_model), "merge"):
        trained = waiting.pop(name, None)
        if isinstance(trained, torch.Tensor):
            tensor = trained
        elif trained is not None:
            tensor = tensor.float()
            tensor = tensor + trained.dense(tensor).float()
        writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if waiting:
        raise UserError(
            f"model.path: {base_model} stores no tensor called {min(waiting)}; its files name weights otherwise than "
            "its modules, which merging shard by shard does not cover" + ("; use adapter/ instead" if updates else "")
        )
    writer.close()
    write_companions(folder, base_model, dtype)


def write_frozen(
    folder: Path,
    base_model: str,
    dtype: torch.dtype,
    subtracted: Mapping[str, LowRank],
    double: bool,
    device: torch.device,
) -> None:
    """Write the frozen base of a quantised run to ``folder``: NF4 values of W − s·B·A, dequantised, in ``dtype``.

    Quantised again on ``device``, where training ran, tensor by tensor: the same values that training computed with.
    """
    with whole_weights(), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_model, trust_remote_code=False))
    linear = {f"{name}.weight": name for name in target_modules(empty, "all-linear")}
    writer = ShardWriter(folder)
    for key, tensor in progress(base_tensors(base_model), "dequantise"):
        if key in linear:
            residual = residual_weight(tensor.to(dtype).to(device), subtracted.get(linear.pop(key)), dtype)
            tensor = nf4_values(residual, double)
        writer.add(key, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if linear:
        raise UserError(
            f"model.path: {base_model} stores no tensor called {min(linear)}; its files name weights otherwise than "
            "its modules, which dequantising shard by shard does not cover; use model.quantization: none"
        )
    writer.close()
    write_companions(folder, base_model, dtype)


def write_companions(folder: Path, base_model: str, dtype: torch.dtype) -> None:
    """Configuration, generation configuration and tokenizer, so that the folder loads by itself."""
    config = AutoConfig.from_pretrained(base_model, trust_remote_code=False)
    config.dtype = dtype
    config.save_pretrained(folder)
    try:
        GenerationConfig.from_pretrained(base_model).save_pretrained(folder)
    except OSError:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    load_tokenizer(base_model).save_pretrained(folder)


def cast_model(source: Path, folder: Path, base_model: str, dtype: torch.dtype) -> None:
    """A fully fine-tuned model from its fp32 checkpoint, in ``dtype``, with configuration and tokenizer."""
    writer = ShardWriter(folder)
    for name, tensor in read_tensors(source):
        writer.add(name, tensor.to(dtype))
    writer.close()
    write_companions(folder, base_model, dtype)


def base_tensors(base_model: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the base model's safetensors files, in the order of files.

    Raises:
        UserError: there are no safetensors files.
    """
    options = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(base_model, INDEX, **options)
    for file in [SINGLE] if index is None else sorted(set(read_json(Path(index))["weight_map"].values())):
        path = cached_file(base_model, file, **options)
        if path is None:
            raise UserError(f"model.path: {base_model} has no {file}; convert its weights to safetensors first")
        yield from read_file(Path(path))
