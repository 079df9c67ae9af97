"""Writing a large model as safetensors shards, one in memory at a time, and reading them back."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from harness.files import write_json, write_tensors

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors in order and writes a shard whenever the next tensor would make it larger than the limit."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it is on disk at the latest after `close`."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.detach().cpu()
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write the last shard, give the files their final names, and write the index if there are several."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        write_json(self._folder / INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})

    def _flush(self) -> None:
        write_tensors(self._part(len(self._shards)), self._pending, {"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number + 1:05d}.safetensors"


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the safetensors files in ``folder``, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        yield from read_file(file)


def read_file(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of one safetensors file, one at a time."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            yield name, tensors.get_tensor(name)
