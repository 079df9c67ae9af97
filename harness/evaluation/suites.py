"""Suites: named lists of tasks in ``eval/suites/*.yaml``, with what each task needs.

A suite is data. It says which lm-eval tasks it holds, what it changes about them (metric to report, few-shot examples,
generation), and under which names a local copy of their data is looked for. There are four kinds: ``generative``
suites are evaluated by `harness.evaluation.engines`; ``encoder`` suites hold classification and span tasks and
``visual`` suites questions about images, with their metrics (`harness.evaluation.direct`); a ``dialogue`` suite holds
questions that a judge marks (`harness.evaluation.mt_bench`).

A name means one thing: a task under lm-eval's own name is lm-eval's own task with another place for its data, and a
suite that changes anything about it gives it a name of its own (``from`` says where it comes from).
"""

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import UserError
from harness.evaluation.encoder_metrics import METRICS
from harness.evaluation.visual_metrics import VISUAL_METRICS
from harness.resources import find

_PACKAGED = "eval/suites"
_PREFIX = "suite:"
_HOW = {
    "encoder": "is for encoders",
    "visual": "is for models that read images (task: image_text)",
    "dialogue": "is marked by a judge (eval/mt_bench.py)",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Needs(_Strict):
    """What must be installed for a task: Python modules, and resources of nltk such as ``tokenizers/punkt_tab``."""

    modules: tuple[str, ...] = ()
    nltk: tuple[str, ...] = ()
    install: str = ""

    def check(self, task: str) -> None:
        """Raises:
        UserError: something is not there; says how it is installed.
        """
        missing = [module for module in self.modules if importlib.util.find_spec(module) is None]
        if missing:
            raise UserError(f"eval: the task '{task}' needs {', '.join(missing)}; pip install {self.install}")
        for resource in self.nltk:
            places = list(_nltk_folders())
            if not any((place / resource).exists() or (place / f"{resource}.zip").exists() for place in places):
                raise UserError(
                    f"eval: the task '{task}' needs nltk's {resource}; on a machine with a network run "
                    f"`python -m nltk.downloader {Path(resource).name}` and copy its nltk_data to {places[0]}"
                )


class SuiteTask(_Strict):
    """One task of a generative suite.

    Attributes:
        task: its name in configurations and results.
        base: lm-eval's name of the task that it is made from, or its file under ``lm_eval/tasks``; by default ``task``.
        members: the tasks of a group; the group itself has a score and no data.
        metric: the one to report, if not the first of the base's.
        filter: the one to report, if not the first of the base's.
        data: for each split, files in ``eval.data_dir``, without or with a suffix.
        source: where the data come from, if not from the hub.
    """

    task: str
    base: str | None = Field(None, alias="from")
    members: tuple["SuiteTask", ...] = ()
    metric: str | None = None
    filter: str | None = None
    num_fewshot: int | None = None
    generation_kwargs: dict[str, Any] = {}
    data: dict[str, str | list[str]] = {}
    source: str | None = None
    needs: Needs = Needs()

    @property
    def is_changed(self) -> bool:
        """True if it scores otherwise than its base."""
        return bool(self.metric or self.filter or self.num_fewshot is not None or self.generation_kwargs)

    def applied(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The base's configuration with this task's name and changes.

        Raises:
            UserError: the base has no such metric or filter.
        """
        changed = dict(config)
        if "group" in config:
            return changed | {"group": self.task, "task": [member.task for member in self.members]}
        changed["task"] = self.task
        if self.num_fewshot is not None:
            changed["num_fewshot"] = self.num_fewshot
        if self.generation_kwargs:
            changed["generation_kwargs"] = {**(config.get("generation_kwargs") or {}), **self.generation_kwargs}
        for key, wanted, name in (("metric_list", self.metric, "metric"), ("filter_list", self.filter, "name")):
            if wanted is not None:
                changed[key] = _first(wanted, config.get(key) or [], name, self.task)
        return changed


class EncoderTask(_Strict):
    """One task of an encoder suite.

    Attributes:
        texts: the columns that the encoder reads, one or two.
        label: the column to predict.
        classes: names of the classes in the order of their numbers; empty for a number (regression) or a span of text.
        metrics: names in `harness.evaluation.encoder_metrics.METRICS`, the reported one first.
        data: for each split, files in ``eval.data_dir``.
        hub: hub id and configuration of the data set.
    """

    task: str
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...] = ()
    metrics: tuple[Literal[tuple(METRICS)], ...]  # type: ignore[valid-type]
    data: dict[str, str | list[str]]
    hub: tuple[str, ...]


class VisualTask(_Strict):
    """One task of a visual suite.

    Attributes:
        columns: fields of `harness.config.SourceConfig` that say what a question is: ``image``, ``prompt``, ``pair``
            (a hint), ``options``, ``instruction``, ``response``.
        metrics: names that `harness.tasks.image_text.ImageText.score` knows, the reported one first.
        data: for each split, a file in ``eval.data_dir``; paths of images start in its folder.
        hub: hub id and configuration of the data set.
        source: where the data come from, if not from the hub as they are.
    """

    task: str
    columns: dict[str, str | list[str]]
    metrics: tuple[Literal[VISUAL_METRICS], ...]  # type: ignore[valid-type]
    data: dict[str, str | list[str]]
    hub: tuple[str, ...] = ()
    source: str | None = None


class DialogueTask(_Strict):
    """Questions with one or more turns; ``data`` names their file in ``eval.data_dir``."""

    task: str
    data: dict[str, str]
    source: str


class Suite(_Strict):
    """A suite file."""

    suite: str
    kind: Literal["generative", "encoder", "visual", "dialogue"] = "generative"
    description: str
    tasks: tuple[SuiteTask, ...] | tuple[EncoderTask, ...] | tuple[VisualTask, ...] | tuple[DialogueTask, ...]

    @property
    def names(self) -> list[str]:
        """The tasks that are reported, in order."""
        return [task.task for task in self.tasks]


def read_suites(include_path: Path | None = None) -> dict[str, Suite]:
    """Every suite by name: the package's, and those in the user's folder of task files, which win.

    Raises:
        UserError: a file is no suite.
    """
    return {suite.suite: suite for _, suite in suite_files(include_path)}


def suite_files(include_path: Path | None = None) -> Iterator[tuple[Path, Suite]]:
    """Suite files with their content, the ones that win last."""
    for folder in (find(_PACKAGED), include_path):
        for path in sorted(folder.rglob("*.yaml")) if folder is not None else ():
            content = _content(path)
            if content is None:
                continue
            try:
                suite = Suite.model_validate(_of_its_kind(content))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise UserError(f"eval.include_path: the suite {path} is wrong at {where}: {first['msg']}") from error
            yield path, suite


def expand(names: Sequence[str], include_path: Path | None = None) -> list[str]:
    """Task names with suites replaced by their tasks: ``suite:math``, or ``math`` where that is a suite.

    Raises:
        UserError: there is no such suite, it is not evaluated by generating or choosing text, or a task stands twice.
    """
    suites = read_suites(include_path)
    expanded: list[str] = []
    for name in names:
        bare = name.removeprefix(_PREFIX)
        if bare not in suites:
            if bare != name:
                raise UserError(f"eval: unknown suite '{bare}'; the suites are {', '.join(sorted(suites))}")
            expanded.append(name)
            continue
        suite = suites[bare]
        if suite.kind != "generative":
            how = _HOW[suite.kind]
            usable = ", ".join(sorted(suite.suite for suite in suites.values() if suite.kind == "generative"))
            raise UserError(f"eval: the suite '{bare}' {how} and cannot stand here; the others are {usable}")
        expanded += suite.names
    twice = next((name for name in expanded if expanded.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"eval: the task '{twice}' is named twice, by itself or by suites; name it once")
    return expanded


def _of_its_kind(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its tasks validated as tasks of its kind, so that a mistake is reported for that kind only."""
    kinds = {"generative": SuiteTask, "encoder": EncoderTask, "visual": VisualTask, "dialogue": DialogueTask}
    task = kinds.get(content.get("kind", "generative"), SuiteTask)
    tasks = content.get("tasks")
    return {**content, "tasks": tuple(task.model_validate(one) for one in tasks) if isinstance(tasks, list) else ()}


def _content(path: Path) -> dict[str, Any] | None:
    """A suite file's content; None where the file is something else (task files may hold more than plain YAML)."""
    text = path.read_text(encoding="utf-8")
    if not any(line.startswith("suite:") for line in text.splitlines()):
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"eval.include_path: {path} cannot be read: {' '.join(str(error).split())}") from error


def _first(wanted: str, entries: Sequence[Mapping[str, Any]], name: str, task: str) -> list[Mapping[str, Any]]:
    """The entries with the wanted one first."""
    names = [getattr(entry[name], "__name__", entry[name]) for entry in entries]
    if wanted not in names:
        raise UserError(f"eval: the task '{task}' reports '{wanted}', and its base has {', '.join(names) or 'none'}")
    chosen = entries[names.index(wanted)]
    return [chosen, *(entry for entry in entries if entry is not chosen)]


def _nltk_folders() -> Iterator[Path]:
    """Where nltk looks for its resources."""
    yield Path.home() / "nltk_data"
    yield from (Path(folder) for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder)
    for prefix in (sys.prefix, "/usr", "/usr/local"):
        yield from (Path(prefix, *parts) for parts in (("nltk_data",), ("share", "nltk_data"), ("lib", "nltk_data")))
