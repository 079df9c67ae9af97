"""Which run of a sweep may start now, so that work which several runs share is done once.

Statistics, plain decompositions, initial adapters and scores are kept by content (`harness.cache`,
`harness.evaluation`): the second run that wants them takes what the first one left. Two that want the same at the same
moment would both compute it. So the content has a key here, one run at a time holds it, and it is handed on when the
stage that makes it is finished. Nothing here starts a process.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.cluster.sweep_cells import Cell
from harness.config import RunConfig, SourceConfig
from harness.methods.registry import build_method, required_statistics
from harness.pipeline import STAGES, has_work, is_finished, stage_inputs

SHARING = ("calibrate", "init", "eval")  # stages that leave something for other runs
UNTIL_EXPORT = tuple(stage for stage in STAGES if stage not in ("eval", "report"))

Keys = Mapping[str, frozenset[str]]  # stage → what it makes


@dataclass(frozen=True)
class Assignment:
    """A run that may start now and the stages to run; those that are finished are skipped there."""

    cell: Cell
    stages: tuple[str, ...]


@dataclass
class _State:
    keys: Keys
    finished: set[str]
    status: str = "waiting"
    asked: tuple[str, ...] = ()
    order: tuple[int, ...] = ()


@dataclass
class Schedule:
    """The state of a sweep. A cell is ``waiting``, ``running``, ``finished`` or ``failed``."""

    cells: Sequence[Cell]
    _states: dict[str, _State] = field(default_factory=dict)
    _made: set[str] = field(default_factory=set)
    _held: dict[str, str] = field(default_factory=dict)  # key → cell that is making it

    def __post_init__(self) -> None:
        for place, cell in enumerate(self.cells):
            finished = finished_stages(cell)
            state = _State(shared_work(cell.config), finished)
            # Begun runs first, then those whose statistics serve most others.
            state.order = (0 if finished else 1, -len(state.keys["calibrate"]), place)
            state.status = "finished" if finished >= set(STAGES) else "waiting"
            self._states[cell.name] = state
            for stage in SHARING:
                if stage in finished:
                    self._made |= state.keys[stage]

    def status(self, cell: Cell) -> str:
        """waiting, running, finished or failed."""
        return self._states[cell.name].status

    def count(self, status: str) -> int:
        """How many cells are in that state."""
        return sum(state.status == status for state in self._states.values())

    @property
    def over(self) -> bool:
        """Whether nothing is left to start or to wait for."""
        return not self.count("waiting") and not self.count("running")

    def ready(self) -> list[Assignment]:
        """What may start now, the most urgent first: trained runs, begun runs, then the others."""
        waiting = [cell for cell in self.cells if self.status(cell) == "waiting"]
        trained = {cell.name for cell in waiting if self._trained(cell)}
        waiting.sort(key=lambda cell: (cell.name not in trained, self._states[cell.name].order))
        found = []
        for cell in waiting:
            free = {stage: not self._elsewhere(cell, stage) for stage in SHARING}
            if cell.name in trained:
                if free["eval"]:
                    found.append(Assignment(cell, STAGES))
            elif free["calibrate"] and free["init"]:
                alone = all(self._wanted(key) == 1 for key in self._unmade(cell, "eval"))
                found.append(Assignment(cell, STAGES if alone else UNTIL_EXPORT))
        return found

    def start(self, assignment: Assignment) -> list[str]:
        """Note that a run is started; the stages whose results other runs will take from it."""
        cell, state = assignment.cell, self._states[assignment.cell.name]
        state.status, state.asked = "running", assignment.stages
        leading = []
        for stage in SHARING:
            unmade = self._unmade(cell, stage) if stage in assignment.stages else frozenset()
            if any(self._wanted(key) > 1 for key in unmade):
                leading.append(stage)
            self._held |= dict.fromkeys(unmade, cell.name)
        return leading

    def stage_finished(self, cell: Cell, stage: str) -> None:
        """Hand on what a stage made."""
        state = self._states[cell.name]
        state.finished.add(stage)
        for key in state.keys.get(stage, ()):
            self._made.add(key)
            self._held.pop(key, None)

    def ended(self, cell: Cell, outcome: str) -> None:
        """Note that the run's process has ended. ``outcome``: done (all that was asked), again, or failed."""
        state = self._states[cell.name]
        if outcome == "done":
            for stage in state.asked:
                self.stage_finished(cell, stage)
        self._held = {key: holder for key, holder in self._held.items() if holder != cell.name}
        complete = outcome == "done" and state.finished >= set(STAGES)
        state.status = "failed" if outcome == "failed" else "finished" if complete else "waiting"

    def _trained(self, cell: Cell) -> bool:
        return self._states[cell.name].finished >= set(UNTIL_EXPORT)

    def _unmade(self, cell: Cell, stage: str) -> frozenset[str]:
        state = self._states[cell.name]
        return frozenset() if stage in state.finished else state.keys[stage] - self._made

    def _elsewhere(self, cell: Cell, stage: str) -> bool:
        """Whether another run is making what this one wants from ``stage``."""
        return any(self._held.get(key, cell.name) != cell.name for key in self._unmade(cell, stage))

    def _wanted(self, key: str) -> int:
        """How many runs, not given up, want it."""
        return sum(
            any(key in keys for keys in state.keys.values())
            for state in self._states.values()
            if state.status not in ("finished", "failed")
        )


def finished_stages(cell: Cell) -> set[str]:
    """The stages with a record that matches; those without work count as finished."""
    return {stage for stage in STAGES if not has_work(cell.config, stage) or is_finished(cell.config, cell.run, stage)}


def shared_work(config: RunConfig) -> dict[str, frozenset[str]]:
    """Stage → keys of what it makes and other runs may take; equal keys are equal content."""
    keys: dict[str, frozenset[str]] = dict.fromkeys(SHARING, frozenset())
    if config.init.cache:
        keys["calibrate"] = _statistics(config)
        keys["init"] = _decompositions(config)
    keys["eval"] = _base_scores(config)
    return keys


def _statistics(config: RunConfig) -> frozenset[str]:
    """A key for every round of every kind of statistic: methods that ask for different ones share what is common."""
    request = required_statistics(config)
    if request is None:
        return frozenset()
    # Statistics are of the model before quantisation, and know nothing of the method that asked for them.
    own = ("method.", "model.quantization", "model.double_quantization", "statistics")
    rows = {key: value for key, value in stage_inputs(config, "calibrate").items() if not key.startswith(own)}
    source = config.data.preserve if request.data == "preserve" else config.data.train
    rounds, seed = range(request.rounds), rows.pop("train.seed")
    if source is not None and not _takes_all(source):
        rows["train.seed"] = seed
    else:  # every seed and every round draws the same rows
        rounds = range(1)
    labels = (request.fisher, seed if request.fisher == "mc" else None)
    return frozenset(
        _key("statistics", rows, kind, number, None if kind == "input_covariance" else labels)
        for kind in request.kinds
        for number in rounds
    )


def _takes_all(source: SourceConfig) -> bool:
    """Whether a data set has no more rows than are drawn; False where only a full read would tell."""
    path = Path(source.path)
    if path.suffix != ".jsonl" or source.split != "train" or not path.is_file():
        return False
    with path.open("rb") as file:
        rows = (line for line in file if line.strip())
        return sum(1 for _ in itertools.islice(rows, source.samples + 1)) <= source.samples


def _decompositions(config: RunConfig) -> frozenset[str]:
    """The initial adapters of all layers, and plain SVDs of base weights, which no seed changes.

    A method that learns from statistics starts from others for every seed: its runs do not wait for each other.
    """
    keys = [_key("init", stage_inputs(config, "init"))]
    if build_method(config.method, config.train.seed).statistics() is None:
        keys.append(_key("plain-svd", config.model.model_dump(mode="json"), config.method, config.init.solver))
    return frozenset(keys)


def _base_scores(config: RunConfig) -> frozenset[str]:
    """The base model's score on every task."""
    options = config.eval.model_dump(mode="json")
    how = {
        key: value
        for key, value in options.items()
        if key not in ("knowledge", "task", "checkpoints", "batch_size", "full_fine_tuning")
    }
    model = [config.model.path, config.model.dtype]
    return frozenset(_key("base", model, how, task) for task in (*config.eval.knowledge, *config.eval.task))


def _key(*content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=asdict)
    return f"{content[0]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
