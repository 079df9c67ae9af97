"""Statistics on disk: safetensors files and ``index.json``.

The index maps module → statistic → rounds of ``file``, ``key``, ``tokens``, ``dtype`` and ``checksum``.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from harness.errors import UserError
from harness.files import read_json, sha256, write_json, write_tensors
from harness.statistics.statistic import Kind, Statistic

INDEX = "index.json"


class StatisticsWriter:
    """Collects the files of all sampling rounds; the index, written last by `close`, makes them a whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, dict[str, list[dict[str, object]]]] = {}

    def add(self, kind: Kind, statistics: Mapping[str, Statistic], groups: Mapping[str, str]) -> None:
        """Write the next round of ``kind``, a file per entry of ``statistics``; ``groups`` maps every module to one."""
        entries = {}
        done = max((len(kinds.get(kind, ())) for kinds in self._modules.values()), default=0)
        for number, (group, statistic) in enumerate(statistics.items()):
            file = self._folder / f"{kind}-{done}-{number:05d}.safetensors"
            write_tensors(file, {kind: statistic.matrix}, {"tokens": str(statistic.tokens)})
            entries[group] = {
                "file": file.name,
                "key": kind,
                "tokens": statistic.tokens,
                "dtype": str(statistic.matrix.dtype).removeprefix("torch."),
                "checksum": f"sha256:{sha256(file)}",
            }
        for name, group in groups.items():
            self._modules.setdefault(name, {}).setdefault(kind, []).append(entries[group])

    def close(self) -> None:
        """Write the index."""
        write_json(self._folder / INDEX, {"modules": self._modules})


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

    def read(self, kind: Kind, layer: str, sampling_round: int = 0) -> Statistic:
        """One statistic of ``layer``.

        Raises:
            UserError: the file is missing or its content is not what was written.
        """
        entry = self._modules[layer][kind][sampling_round]
        file = self._folder / entry["file"]
        if entry["file"] not in self._verified:
            if not file.is_file() or f"sha256:{sha256(file)}" != entry["checksum"]:
                raise UserError(f"statistics: {file} is missing or damaged; run again with --force calibrate")
            self._verified.add(entry["file"])
        with safe_open(file, framework="pt") as tensors:
            return Statistic(tensors.get_tensor(entry["key"]), int(entry["tokens"]))
