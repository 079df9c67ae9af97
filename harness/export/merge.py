"""Merged checkpoints: the original base with the update added, written shard by shard."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.utils import cached_file

from harness.console import progress
from harness.errors import UserError
from harness.export.shards import INDEX, SHARD_BYTES, ShardWriter, read_file, read_tensors
from harness.files import read_json
from harness.methods.base import LowRank
from harness.models.loading import load_tokenizer

SINGLE = "model.safetensors"


def write_merged(
    folder: Path,
    base_model: str,
    dtype: torch.dtype,
    updates: Mapping[str, LowRank],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write base + updates to ``folder`` with configuration and tokenizer, one tensor in memory at a time.

    Sums are taken in fp32 and rounded once, to ``dtype``.

    Raises:
        UserError: the base has no safetensors files, or an updated layer is not among their tensors.
    """
    waiting = {f"{name}.weight": update for name, update in updates.items()}
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in progress(base_tensors(base_model), "merge"):
        update = waiting.pop(name, None)
        if update is not None:
            tensor = tensor.float() + update.dense().float()
        writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if waiting:
        raise UserError(
            f"model.path: {base_model} stores no tensor called {min(waiting)}; its files name weights otherwise than "
            "its modules, which merging shard by shard does not cover; use adapter/ instead"
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
