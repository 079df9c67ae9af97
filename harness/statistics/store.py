"""Statistics on disk: ``index.json`` (module → file, key, tokens, dtype, checksum) beside safetensors files."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from harness.errors import UserError
from harness.files import read_json, sha256, write_json, write_tensors
from harness.statistics.covariance import InputCovariance

INDEX = "index.json"


def write_statistics(folder: Path, covariances: Mapping[str, InputCovariance], groups: Mapping[str, str]) -> None:
    """Write one file per distinct input; the index, written last, maps every module to its file."""
    entries = {}
    for number, (group, covariance) in enumerate(covariances.items()):
        file = folder / f"input_covariance-{number:05d}.safetensors"
        write_tensors(file, {"input_covariance": covariance.matrix}, {"tokens": str(covariance.tokens)})
        entries[group] = {
            "file": file.name,
            "key": "input_covariance",
            "tokens": covariance.tokens,
            "dtype": str(covariance.matrix.dtype).removeprefix("torch."),
            "checksum": f"sha256:{sha256(file)}",
        }
    index = {"statistic": "input_covariance", "modules": {name: entries[group] for name, group in groups.items()}}
    write_json(folder / INDEX, index)


class StatisticsReader:
    """Statistics of one run, read one layer at a time; every file is checked against its checksum once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, dict[str, str]] = read_json(folder / INDEX)["modules"]
        self._verified: set[str] = set()

    def input_covariance(self, layer: str) -> InputCovariance:
        """The input covariance of ``layer``.

        Raises:
            UserError: the file is missing or its content is not what was written.
        """
        entry = self._modules[layer]
        file = self._folder / entry["file"]
        if entry["file"] not in self._verified:
            if not file.is_file() or f"sha256:{sha256(file)}" != entry["checksum"]:
                raise UserError(f"statistics: {file} is missing or damaged; run again with --force calibrate")
            self._verified.add(entry["file"])
        with safe_open(file, framework="pt") as tensors:
            return InputCovariance(tensors.get_tensor(entry["key"]), int(entry["tokens"]))
