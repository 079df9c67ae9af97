"""Statistics on disk: safetensors files and ``index.json``.

The index maps module → statistic → rounds of ``file``, ``key``, ``tokens``, ``dtype`` and ``checksum``.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import safe_open

from harness.errors import UserError
from harness.files import read_json, sha256, write_json, write_tensors
from harness.statistics.statistic import Kind, Statistic

INDEX = "index.json"
WRITERS = 2  # files that are written while the next statistics are collected; each holds its matrix twice


class StatisticsWriter:
    """Writes the files of all sampling rounds; the index, written last by `close`, makes them a whole.

    Several ranks may write into one folder, each the statistics that it owns. Files are written in threads, which end
    with the ``with`` block or with `close`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, int, str], dict[str, object]] = {}  # kind, round, group
        self._groups: dict[tuple[str, int], dict[str, str]] = {}  # kind, round → module → group
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="write-statistics")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, kind: Kind, statistics: Mapping[str, Statistic], groups: Mapping[str, str]) -> None:
        """Write the next round of ``kind``, a file per entry of ``statistics``; ``groups`` maps every module to one."""
        done = sum(1 for known, _ in self._groups if known == kind)
        for group, statistic in statistics.items():
            self.write(kind, group, statistic, done)
        self.serve(kind, groups, done)

    def write(
        self,
        kind: Kind,
        group: str,
        statistic: Statistic,
        sampling_round: int = 0,
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Write one file, named after its statistic; one that is written again replaces the former.

        ``then`` is called afterwards, in the thread that wrote it.
        """
        while len(self._pending) >= WRITERS:
            self._pending.pop(0).result()
        self._pending.append(self._threads.submit(self._write, kind, group, statistic, sampling_round, then))

    def serve(self, kind: Kind, groups: Mapping[str, str], sampling_round: int = 0) -> None:
        """Say under which group each module finds its statistic."""
        self._groups[kind, sampling_round] = dict(groups)

    def drain(self) -> None:
        """Wait until everything is written. Raises `OSError` where it cannot be."""
        while self._pending:
            self._pending.pop(0).result()

    def close(self, collective: bool = False) -> None:
        """Wait for the files and write the index; ``collective``: of all ranks' files, by rank 0, once all are there.

        Raises:
            OSError: a file could not be written.
        """
        self.drain()
        self._threads.shutdown()
        parts = [self._files]
        if collective and torch.distributed.is_initialized():
            parts = [{}] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self._files)
            if torch.distributed.get_rank() > 0:
                return
        files = {key: entry for part in parts for key, entry in part.items()}
        modules: dict[str, dict[str, list[dict[str, object]]]] = {}
        for (kind, number), groups in sorted(self._groups.items(), key=lambda item: item[0][1]):
            for name, group in groups.items():
                modules.setdefault(name, {}).setdefault(kind, []).append(files[kind, number, group])
        write_json(self._folder / INDEX, {"modules": modules})

    def _write(
        self, kind: Kind, group: str, statistic: Statistic, sampling_round: int, then: Callable[[], object]
    ) -> None:
        file = self._folder / f"{kind}-{sampling_round}-{group}.safetensors"
        write_tensors(file, {kind: statistic.matrix}, {"tokens": str(statistic.tokens)})
        self._files[kind, sampling_round, group] = {
            "file": file.name,
            "key": kind,
            "tokens": statistic.tokens,
            "dtype": str(statistic.matrix.dtype).removeprefix("torch."),
            "checksum": f"sha256:{sha256(file)}",
        }
        then()


class StatisticsReader:
    """Statistics of one run, read one layer at a time; every file is checked against its checksum once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, dict[str, list[dict[str, str]]]] = read_json(folder / INDEX)["modules"]
        self._verified: set[str] = set()

    def input_covariance(self, layer: str, sampling_round: int = 0) -> Statistic:
        """Mean of x xᵀ over real tokens, (in, in). Raises `UserError` like `read`."""
        return self.read("input_covariance", layer, sampling_round)

    def output_gradient_covariance(self, layer: str) -> Statistic:
        """Mean of δ δᵀ over real tokens, (out, out). Raises `UserError` like `read`."""
        return self.read("output_gradient_covariance", layer)

    def weight_gradient(self, layer: str) -> Statistic:
        """Mean of the loss gradient with respect to the weight, (out, in). Raises `UserError` like `read`."""
        return self.read("weight_gradient", layer)

    def rounds(self, layer: str) -> int:
        """How many sampling rounds of input covariances there are."""
        return len(self._modules[layer].get("input_covariance", ()))

    def checksums(self, layer: str) -> list[list[str]]:
        """What the statistics of ``layer`` are known by: kind and checksum of every file, after a check of them all.

        Raises:
            UserError: a file is missing or its content is not what was written.
        """
        entries = [(kind, entry) for kind, rounds in sorted(self._modules.get(layer, {}).items()) for entry in rounds]
        for _, entry in entries:
            self._verify(entry)
        return [[kind, entry["checksum"]] for kind, entry in entries]

    def read(self, kind: Kind, layer: str, sampling_round: int = 0) -> Statistic:
        """One statistic of ``layer``.

        Raises:
            UserError: the file is missing or its content is not what was written.
        """
        entry = self._modules[layer][kind][sampling_round]
        self._verify(entry)
        with safe_open(self._folder / entry["file"], framework="pt") as tensors:
            return Statistic(tensors.get_tensor(entry["key"]), int(entry["tokens"]))

    def _verify(self, entry: Mapping[str, str]) -> None:
        file = self._folder / entry["file"]
        if entry["file"] in self._verified:
            return
        if not file.is_file() or f"sha256:{sha256(file)}" != entry["checksum"]:
            raise UserError(f"statistics: {file} is missing or damaged; run again with --force calibrate")
        self._verified.add(entry["file"])
