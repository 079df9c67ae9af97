"""Statistics that other runs collected: the same model, rows and layer give the same matrix.

A cache entry per statistic, and one per kind and round that says which there are. What a statistic depends on is its
whole key: the model's files, its dtype, the token ids (for gradients: labels, whose labels, and the seed where they are
drawn), the layer, and the version of the formula. Batch size, ranks and the way of collecting change rounding alone.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache as memoised
from pathlib import Path
from typing import Any

import torch

from harness.cache import Cache
from harness.config import ModelConfig
from harness.data.tokenisation import Row
from harness.files import sha256
from harness.models.weights import model_folder
from harness.statistics.loss import Labels
from harness.statistics.statistic import Kind, Statistic
from harness.statistics.store import StatisticsWriter
from harness.training.distributed import rank, world_size
from harness.training.ownership import assign_by_cost

FORMULA = 1  # to be raised where a statistic of the same content becomes another number
_KIND = "statistics"


class KeptStatistics:
    """Statistics of one model's ``layers`` in a cache. The same arguments on all ranks."""

    def __init__(self, cache: Cache, config: ModelConfig, layers: Sequence[str], labels: Labels) -> None:
        self._cache, self._layers, self._labels = cache, list(layers), labels
        self._model = {"model": _shared(lambda: model_checksum(config.path)), "dtype": config.dtype, "formula": FORMULA}
        self._one_at_a_time = threading.Lock()

    def take(
        self, kinds: Sequence[Kind], rows: Sequence[Row], sampling_round: int, writer: StatisticsWriter
    ) -> dict[Kind, dict[str, str]] | None:
        """Write a round's statistics from the cache, each by the rank that owns it; None where any is missing.

        Returns:
            kind → layer → group. The same on all ranks. Collective.
        """
        groups = _shared(lambda: self._listed(kinds, rows))
        if groups is None:
            return None
        wanted = [(kind, group) for kind in kinds for group in dict.fromkeys(groups[kind].values())]
        owners = assign_by_cost([1.0] * len(wanted), world_size())
        complete = True
        for (kind, group), owner in zip(wanted, owners, strict=True):
            if owner == rank() and complete:
                found = self._cache.get(_KIND, self._content(kind, rows) | {"layer": group})
                complete = found is not None
                if found is not None:
                    writer.write(kind, group, Statistic(found["matrix"], int(found["tokens"])), sampling_round)
        if not _all(complete):
            writer.drain()  # the same files will be written again
            return None
        return groups

    def keep(self, kind: Kind, rows: Sequence[Row], group: str, statistic: Statistic) -> None:
        """Keep one statistic; any thread may call it."""
        tensors = {"matrix": statistic.matrix, "tokens": torch.tensor(statistic.tokens)}
        with self._one_at_a_time:
            self._cache.put(_KIND, self._content(kind, rows) | {"layer": group}, tensors)

    def list(self, kind: Kind, rows: Sequence[Row], groups: Mapping[str, str]) -> None:
        """Keep the list of a round's statistics, once all are kept; by one rank."""
        content = torch.frombuffer(bytearray(json.dumps(groups).encode()), dtype=torch.uint8)
        self._cache.put(_KIND, self._content(kind, rows) | {"layers": self._layers}, {"groups": content})

    def _listed(self, kinds: Sequence[Kind], rows: Sequence[Row]) -> dict[Kind, dict[str, str]] | None:
        groups = {}
        for kind in kinds:
            found = self._cache.get(_KIND, self._content(kind, rows) | {"layers": self._layers})
            if found is None:
                return None
            groups[kind] = json.loads(found["groups"].numpy().tobytes())
        return groups

    def _content(self, kind: Kind, rows: Sequence[Row]) -> dict[str, Any]:
        content = {**self._model, "kind": kind, "ids": _digest([row.input_ids for row in rows])}
        digests = [row.digests() for row in rows]
        if any(digests):
            content["tensors"] = _digest(digests)
        if kind == "input_covariance":
            return content
        seed = self._labels.seed if self._labels.fisher == "mc" else None
        content |= {"labels": _digest([row.labels for row in rows]), "fisher": self._labels.fisher, "seed": seed}
        if rows[0].answer is None:
            return content
        objective = type(self._labels.objective).__name__
        return content | {"answers": _digest([row.answer for row in rows]), "objective": objective}


def model_checksum(path: str) -> str:
    """SHA-256 of what a base model is: its configuration and its safetensors files."""
    folder = model_folder(path)
    files = [file for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"] if file.is_file()]
    return _checksum(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@memoised
def _checksum(files: tuple[tuple[Path, int, int], ...]) -> str:
    with ThreadPoolExecutor(4) as threads:
        sums = list(threads.map(sha256, [file for file, *_ in files]))
    return _digest([[file.name, checksum] for (file, *_), checksum in zip(files, sums, strict=True)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _shared(find: Any) -> Any:
    """What ``find`` finds on rank 0, on all ranks."""
    found = [find() if rank() == 0 else None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    return found[0]


def _all(good: bool) -> bool:
    """Whether ``good`` holds on all ranks."""
    if not torch.distributed.is_initialized():
        return good
    every = [False] * world_size()
    torch.distributed.all_gather_object(every, good)
    return all(every)
