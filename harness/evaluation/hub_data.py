"""Where a suite's task finds its data: files in ``eval.data_dir``, or the hub; and what to say if neither is there."""

import glob
import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from harness.errors import UserError
from harness.evaluation.suites import SuiteTask

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
_LOCAL = ("json", "parquet", "csv", "text")
_YES = ("1", "true", "yes", "on")


def find_files(
    name: str, config: Mapping[str, Any], task: SuiteTask, data_dir: Path | None
) -> dict[str, list[str]] | None:
    """The files of each split in ``data_dir``; None if there is none at all.

    Raises:
        UserError: some files are there and others are not.
    """
    if data_dir is None:
        return None
    found = {split: [_matches(data_dir, file) for file in _listed(files)] for split, files in task.data.items()}
    flat = [matches for some in found.values() for matches in some]
    if not any(flat):
        return None
    if not all(flat):
        raise missing_data(name, config, task, data_dir)
    return {split: [path for matches in some for path in matches] for split, some in found.items()}


def on_hub(config: Mapping[str, Any]) -> bool:
    """True if a task's data set is on the hub and can be had: it is in the cache, or the hub answers."""
    dataset = config.get("dataset_path")
    return isinstance(dataset, str) and dataset not in _LOCAL and (_is_cached(dataset) or hub_answers())


@cache
def hub_answers() -> bool:
    """False if the environment says offline, or nobody can be reached there within three seconds."""
    if any(os.environ.get(key, "").lower() in _YES for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        return False
    if any(os.environ.get(key) for key in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True  # what a proxy reaches is not known here
    address = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


def missing_data(name: str, config: Mapping[str, Any], task: SuiteTask, data_dir: Path | None) -> UserError:
    """What to download where."""
    split, file = next(
        (split, file)
        for split, files in task.data.items()
        for file in _listed(files)
        if data_dir is None or not _matches(data_dir, file)
    )
    place = f"there is no {_shown(file)} in {data_dir}" if data_dir else "eval.data_dir is not set"
    target = Path(data_dir or "DATA_DIR") / (file if Path(file).suffix else f"{file}.jsonl")
    if task.source is not None:
        return UserError(
            f"eval.data_dir: the task '{name}' has no data: {place}; get {task.source}, save it under {target}"
        )
    dataset, subset = config.get("dataset_path"), config.get("dataset_name")
    arguments = ", ".join(repr(one) for one in (dataset, subset) if one)
    command = f"datasets.load_dataset({arguments}, split={split!r}).to_json({target.name!r})"
    return UserError(
        f"eval.data_dir: the task '{name}' has no data: {place}, and the hub cannot be reached; where it can, run "
        f'python -c "import datasets; {command}" and copy the file to {target}'
    )


def _listed(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else files


def _shown(file: str) -> str:
    return file if Path(file).suffix else f"{file}.jsonl (or .json, .parquet)"


def _matches(data_dir: Path, file: str) -> list[str]:
    """Files by a name or pattern; a name without a suffix stands for the first suffix that is there."""
    place = data_dir.absolute() / file
    names = [str(place)] if place.suffix else [f"{place}{suffix}" for suffix in SUFFIXES]
    return next((found for name in names if (found := sorted(glob.glob(name)))), [])


def _is_cached(dataset: str) -> bool:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets") / dataset.replace("/", "___")
    return prepared.is_dir()
