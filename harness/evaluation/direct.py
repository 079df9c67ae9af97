"""The direct evaluation: of tasks that lm-eval has no form for, through `harness.tasks.base.Task.predict`.

``eval.knowledge`` and ``eval.task`` name, for these tasks:

- ``validation``: the rows of ``data.validation``, with the task's own metrics;
- ``preserve``: the rows of ``data.preserve``, in the task that the base could do before (`Task.retention`): of an
  encoder masked-language modelling under the base's own head;
- tasks of the suites of a kind (`eval/suites`) that has this form, with the suite's metrics and data.

Models are loaded one at a time, merged, with the head that was trained. The base has the head as it was drawn: its K is
1, its T what such a head scores.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

import torch

from harness.config import RunConfig, SourceConfig, nearest
from harness.console import say
from harness.errors import UserError
from harness.evaluation.candidates import Candidate
from harness.evaluation.hub_data import find_files, missing_data, on_hub
from harness.evaluation.items import Item
from harness.evaluation.scores import CandidateScores, TaskScore
from harness.evaluation.suites import EncoderTask, Suite, SuiteTask, VisualTask, read_suites
from harness.evaluation.visual_engine import visual_engine, vllm_answers
from harness.tasks.base import Task
from harness.tasks.registry import load_task

if TYPE_CHECKING:
    from torch import nn

VALIDATION, PRESERVE = "validation", "preserve"
ENGINE = "direct"  # in results, where others have the name of an engine
_KINDS = {"image_text": "visual"}  # task → kind of its suites; of the others "encoder"


@dataclass(frozen=True)
class Question:
    """One name of ``eval.knowledge`` or ``eval.task``: whose rows are read in which task, and how answers are scored.

    Attributes:
        key: names the source in messages.
        retention: whether a model is asked as one of the task that the base could do (`Task.retention_model`).
        metrics: the first is the score.
    """

    name: str
    task: Task
    key: str
    source: SourceConfig
    retention: bool
    metrics: tuple[str, ...]
    limit: int | None

    @cached_property
    def asked(self) -> list[Any]:
        """What is asked."""
        examples = self.task.read(self.source, self.key)
        return self.task.asked(examples[: self.limit])


def evaluate_directly(
    config: RunConfig, candidates: Sequence[Candidate], names: Sequence[str]
) -> list[CandidateScores]:
    """Evaluate every candidate on what ``names`` stand for, on the accelerator where there is one.

    Args:
        config: of the run, ``model.path`` at the base with the task's head.

    Raises:
        UserError: as `questions`, or a source cannot be read.
    """
    asked = questions(config, names)
    return [_evaluate_one(config, candidate, asked) for candidate in candidates]


def questions(config: RunConfig, names: Sequence[str]) -> list[Question]:
    """What ``names`` stand for; reads nothing but suites.

    Raises:
        UserError: there is no such name, a source is missing, or a suite's task is not what the run's head is for.
    """
    task = load_task(config)
    return [_question(config, task, name) for name in expanded(config, names)]


def expanded(config: RunConfig, names: Sequence[str]) -> list[str]:
    """The names with suites replaced by their tasks.

    Raises:
        UserError: a name stands twice.
    """
    suites = _suites(config)
    found: list[str] = []
    for name in names:
        suite = suites.get(name.removeprefix("suite:"))
        found += [name] if suite is None else suite.names
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"eval: the task '{twice}' is named twice, by itself or by suites; name it once")
    return found


def _question(config: RunConfig, task: Task, name: str) -> Question:
    limit = config.eval.limit
    if name in (VALIDATION, PRESERVE):
        source = getattr(config.data, name)
        if source is None:
            raise UserError(f"data.{name}: missing; eval names {name!r}, which stands for its rows")
        asking = task.retention() if name == PRESERVE else task
        if not asking.labelled(source) or _is_without_answers(config, source):
            raise UserError(f"data.{name}.response: missing; eval names {name!r}, and its rows need right answers")
        return Question(name, asking, f"data.{name}", source, name == PRESERVE, tuple(asking.metrics), limit)
    entries = {entry.task: entry for suite in _suites(config).values() for entry in suite.tasks}
    if name not in entries:
        known = [VALIDATION, PRESERVE, *_suites(config), *entries]
        raise UserError(
            f"eval: unknown name {name!r}; task {config.task!r} is evaluated on {', '.join(known)}"
            f"{nearest(name, known)}"
        )
    source = suite_source(config, entries[name])
    if _is_without_answers(config, source):
        raise UserError(f"eval: {name!r} has no column of right answers; give its suite columns: {{response: …}}")
    if isinstance(entries[name], EncoderTask) and entries[name].classes:
        task = task.scored_in(entries[name].classes)
    return Question(name, task, f"eval: {name}", source, False, tuple(entries[name].metrics), limit)


def _is_without_answers(config: RunConfig, source: SourceConfig) -> bool:
    """Whether questions about images say no right answers: a loss on them is one on their text, but no score."""
    return config.task == "image_text" and source.response is None


def suite_source(config: RunConfig, entry: Any) -> SourceConfig:
    """Where the rows of a suite's task are: files in ``eval.data_dir``, or the hub.

    ``entry`` has ``task``, ``metrics``, ``data`` (split → files) and ``hub``; unless it is of an encoder suite also
    ``columns``: fields of `SourceConfig` by name.

    Raises:
        UserError: they are nowhere, or the task is not what the run's head is for.
    """
    columns = _encoder_columns(config, entry) if isinstance(entry, EncoderTask) else dict(entry.columns)
    split, files = next((s, f) for s, f in entry.data.items() if s.startswith(("val", "dev", "test")))
    data_dir = None if config.eval.data_dir is None else Path(config.eval.data_dir)
    hub = [*entry.hub, None, None]
    source = entry.source if isinstance(entry, VisualTask) else None
    local = SuiteTask(task=entry.task, data={split: files}, source=source)
    described = {"dataset_path": hub[0], "dataset_name": hub[1]}
    found = find_files(entry.task, described, local, data_dir)
    if found is not None:
        if len(found[split]) > 1:
            raise UserError(f"eval.data_dir: {entry.task!r} has {len(found[split])} files there; put them into one")
        return SourceConfig(path=found[split][0], **columns)
    if not on_hub(described):
        raise missing_data(entry.task, described, local, data_dir)
    return SourceConfig(path=hub[0], subset=hub[1], split=split, **columns)


def _encoder_columns(config: RunConfig, entry: EncoderTask) -> dict[str, Any]:
    """The columns of a task of an encoder suite, if it is what the run's head is for."""
    of_spans = entry.metrics[0].startswith("squad_")
    kind = "question_answering" if of_spans else "sequence_classification" if entry.classes else "regression"
    if kind != config.task:
        raise UserError(f"eval: {entry.task!r} is of the task {kind}, and the run's is {config.task}; name others")
    columns: dict[str, Any] = dict(zip(("prompt", "pair"), entry.texts, strict=False)) | {"response": entry.label}
    if not entry.classes:
        return columns
    classes = load_task(config).classes
    numbered = all(name.isdigit() for name in classes)
    if len(classes) != len(entry.classes) or not (numbered or set(classes) == set(entry.classes)):
        raise UserError(
            f"eval: {entry.task!r} has the classes {', '.join(entry.classes)}, and the run's head has "
            f"{', '.join(classes)}; name another task, or give these in data.train.classes"
        )
    return columns | {"classes": list(entry.classes)}


def _suites(config: RunConfig) -> dict[str, Suite]:
    include_path = None if config.eval.include_path is None else Path(config.eval.include_path)
    kind: Literal["encoder", "visual"] = _KINDS.get(config.task, "encoder")  # type: ignore[assignment]
    return {name: suite for name, suite in read_suites(include_path).items() if suite.kind == kind}


def _evaluate_one(config: RunConfig, candidate: Candidate, asked: Sequence[Question]) -> CandidateScores:
    if config.task == "image_text" and vllm_answers(config.eval.backend):
        images = max(len(example.images) for question in asked for example in question.asked)
        with visual_engine(config, candidate, images) as engine:
            return _answered(config, candidate, engine, asked)
    return _answered(config, candidate, load_candidate(config, candidate), asked)


def _answered(config: RunConfig, candidate: Candidate, model: Any, asked: Sequence[Question]) -> CandidateScores:
    size, scores, answers, items = config.eval.batch_size, {}, {}, {}
    began = time.perf_counter()
    for question in asked:
        task, examples = question.task, question.asked
        if not examples:
            raise UserError(f"{question.key}: {question.source.path} has nothing to ask")
        under = load_task(config).retention_model(model) if question.retention else model
        predictions = task.predict(under, examples, size)
        scores[question.name], items[question.name] = scored(question, predictions)
        answers[question.name] = [item.answer for item in items[question.name]]
    seconds = time.perf_counter() - began
    values = ", ".join(f"{name} {score.value:.3f}" for name, score in scores.items())
    say(f"eval: {candidate.name}: {values} ({seconds:.1f} s)")
    per_second = sum(score.items for score in scores.values()) / seconds
    return CandidateScores(candidate.name, candidate.step, scores, seconds, per_second, answers, items)


def scored(question: Question, predictions: Sequence[Any]) -> tuple[TaskScore, list[Item]]:
    """The score of ``predictions`` and every item with its own, where the score is the mean of these."""
    task, asked = question.task, question.asked
    found = {metric: task.score(metric, predictions, asked) for metric in question.metrics}
    values = {metric: fmean(score) if isinstance(score, list) else float(score) for metric, score in found.items()}
    metric = question.metrics[0]
    of_items = found[metric]
    single = of_items if isinstance(of_items, list) else [None] * len(asked)
    stderr = stdev(of_items) / len(of_items) ** 0.5 if isinstance(of_items, list) and len(of_items) > 1 else None
    items = []
    for number, (example, prediction, score) in enumerate(zip(asked, predictions, single, strict=True)):
        shown = task.shown(example, prediction)
        digest = sha256(f"{shown.question}\x1f{shown.expected}".encode("utf-8", "replace")).hexdigest()
        items.append(Item(f"{number}-{digest[:12]}", score, shown.question, shown.expected, shown.answer))
    others = {name: value for name, value in values.items() if name != metric}
    return TaskScore(metric, values[metric], stderr, len(asked), others), items


def load_candidate(config: RunConfig, candidate: Candidate) -> "nn.Module":
    """The candidate's model with the run's head, its adapter merged, in evaluation mode.

    Raises:
        UserError: it cannot be loaded.
    """
    from harness.models.loading import load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = candidate.merged or candidate.model
    model: Any = load_model(config.model.model_copy(update={"path": str(folder)}), device)
    if candidate.merged is None and candidate.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(candidate.adapter)).merge_and_unload()
    return model.eval()
