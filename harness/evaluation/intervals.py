"""Confidence intervals of K, T, KT and Avg., and of the differences of two runs in them.

Fine-tuned model, base and full fine-tuning are resampled together on the tasks where they answered the same items, see
`harness.evaluation.bootstrap`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from harness.evaluation.bootstrap import Cell, Interval, Key, Means, Resampled
from harness.evaluation.items import ItemScores, item_scores, read_items
from harness.evaluation.retention import harmonic_mean, mean, mean_ratio
from harness.evaluation.significance import paired_test
from harness.run_directory import RunDirectory

QUANTITIES = ("T", "K", "KT", "Avg")
_TUNED, _BASE, _FULL = "tuned", "base", "full fine-tuning"


@dataclass(frozen=True)
class Measured:
    """A model's item scores by task beside those that K and T are measured against.

    A score stands in place of item scores that are not known.

    Attributes:
        tuned: on all tasks.
        base: on the knowledge tasks.
        full_fine_tuning: on the learned tasks; None: T is the raw score.
    """

    knowledge: tuple[str, ...]
    task: tuple[str, ...]
    tuned: Mapping[str, Cell]
    base: Mapping[str, Cell]
    full_fine_tuning: Mapping[str, Cell] | None = None

    def cells(self, owner: str = "") -> dict[Key, Cell]:
        """Everything by model and task; ``owner`` goes before the model's name."""
        cells: dict[Key, Cell] = {(owner + _TUNED, name): self.tuned[name] for name in (*self.knowledge, *self.task)}
        cells |= {(owner + _BASE, name): self.base[name] for name in self.knowledge}
        if self.full_fine_tuning is not None:
            cells |= {(owner + _FULL, name): self.full_fine_tuning[name] for name in self.task}
        return cells

    def quantity(self, name: str, means: Means, owner: str = "") -> np.ndarray:
        """K, T, KT or Avg. from the means of all cells."""

        def of(model: str, tasks: Sequence[str]) -> list[np.ndarray]:
            return [means[owner + model, task] for task in tasks]

        if name == "Avg":
            return mean(of(_TUNED, (*self.knowledge, *self.task)))
        if name == "K":
            return mean_ratio(of(_TUNED, self.knowledge), of(_BASE, self.knowledge))
        if name == "T":
            learned = of(_TUNED, self.task)
            return mean(learned) if self.full_fine_tuning is None else mean_ratio(learned, of(_FULL, self.task))
        return harmonic_mean(self.quantity("K", means, owner), self.quantity("T", means, owner))

    def needs(self, name: str) -> tuple[str, ...]:
        """The tasks that a quantity is made of."""
        return {"K": self.knowledge, "T": self.task}.get(name, (*self.knowledge, *self.task))

    def has_items(self, name: str) -> bool:
        """Whether the tuned model's items are known on every task of a quantity."""
        return all(isinstance(self.tuned[task], ItemScores) for task in self.needs(name))


@dataclass(frozen=True)
class Intervals:
    """Intervals by quantity, only those that are defined, and what has to be known to read them."""

    by_quantity: Mapping[str, Interval] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def full_fine_tuning_cells(run: Path | str, scores: Mapping[str, float]) -> dict[str, Cell]:
    """Item scores of a full fine-tuning run's final model by task, those of ``scores`` where items are not known."""
    items = read_items(RunDirectory(Path(run)).items / "final.jsonl")
    cells: dict[str, Cell] = {}
    for name, value in scores.items():
        known = item_scores(items.get(name, []))
        cells[name] = known if known is not None and abs(known.mean - value) <= 1e-6 else value
    return cells


def retention_intervals(measured: Measured) -> Intervals:
    """95 % intervals of K, T, KT and Avg. of one model."""
    resampled = Resampled(measured.cells())
    found: dict[str, Interval] = {}
    for name in QUANTITIES:
        interval = resampled.interval(_statistic(measured, name)) if measured.has_items(name) else None
        if interval is not None:
            found[name] = interval
    return Intervals(found, tuple(_notes(measured, found)))


@dataclass(frozen=True)
class Difference:
    """How far run a stands above run b in one quantity or on one task.

    Attributes:
        value: a - b.
        interval: 95 % interval of it; None where items are not known.
        p_value: of the paired permutation test over items; None where the two did not answer the same items, are not
            measured against the same scores, or the quantity is no sum over items (KT).
    """

    value: float
    interval: Interval | None
    p_value: float | None


def differences(a: Measured, b: Measured) -> dict[str, Difference]:
    """K, T, KT, Avg. and the raw score of every common task: a less b.

    A task stands under its name, K, T, KT and Avg. under theirs. A quantity that one of the two has not is left out; so
    is one that is measured on different tasks.
    """
    resampled = Resampled(a.cells("a ") | b.cells("b "))
    found: dict[str, Difference] = {}
    for name in QUANTITIES:
        if set(a.needs(name)) != set(b.needs(name)) or not a.needs(name):
            continue
        statistic = _difference(_statistic(a, name, "a "), _statistic(b, name, "b "))
        known = a.has_items(name) and b.has_items(name)
        found[name] = Difference(
            resampled.estimate(statistic),
            resampled.interval(statistic) if known else None,
            _paired_p(a, b, name) if known else None,
        )
    for task in (*a.knowledge, *a.task):
        if task in b.tuned:
            found[task] = _task_difference(resampled, a.tuned[task], b.tuned[task], task)
    return {name: difference for name, difference in found.items() if math.isfinite(difference.value)}


def _task_difference(resampled: Resampled, a: Cell, b: Cell, task: str) -> Difference:
    def statistic(means: Means) -> np.ndarray:
        return means["a " + _TUNED, task] - means["b " + _TUNED, task]

    value = resampled.estimate(statistic)
    if not isinstance(a, ItemScores) or not isinstance(b, ItemScores):
        return Difference(value, None, None)
    p = paired_test(a.values, b.values).p_value if a.ids == b.ids else None
    return Difference(value, resampled.interval(statistic), p)


def _paired_p(a: Measured, b: Measured, name: str) -> float | None:
    """p of the paired test over the items of all tasks of K, T or Avg.

    With the references fixed, each is a weighted sum over items: an item of task j counts 1 / (n_j · reference_j · M).
    """
    if name == "KT":
        return None
    scores_a, scores_b = [], []
    references = {"K": (a.base, b.base), "T": (a.full_fine_tuning, b.full_fine_tuning)}.get(name, (None, None))
    for task in a.needs(name):
        of_a, of_b = a.tuned[task], b.tuned[task]
        reference = _common_reference(references, task)
        if not isinstance(of_a, ItemScores) or not isinstance(of_b, ItemScores) or of_a.ids != of_b.ids:
            return None
        if reference is None:
            return None
        if reference:
            weight = 1 / (len(of_a.ids) * reference)
            scores_a.append(of_a.values * weight)
            scores_b.append(of_b.values * weight)
    return paired_test(np.concatenate(scores_a), np.concatenate(scores_b)).p_value if scores_a else None


def _common_reference(references: Sequence[Mapping[str, Cell] | None], task: str) -> float | None:
    """The score that both are divided by (1 where there is none); None where they differ."""
    of_a, of_b = (1.0 if some is None else _value(some[task]) for some in references)
    return of_a if math.isclose(of_a, of_b, rel_tol=1e-9) else None


def _value(cell: Cell) -> float:
    return cell.mean if isinstance(cell, ItemScores) else float(cell)


def _statistic(measured: Measured, name: str, owner: str = "") -> Callable[[Means], np.ndarray]:
    return lambda means: np.atleast_1d(measured.quantity(name, means, owner))


def _difference(a: Callable[[Means], np.ndarray], b: Callable[[Means], np.ndarray]) -> Callable[[Means], np.ndarray]:
    return lambda means: a(means) - b(means)


def _notes(measured: Measured, found: Mapping[str, Interval]) -> list[str]:
    notes = []
    tasks = (*measured.knowledge, *measured.task)
    unknown = [task for task in tasks if not isinstance(measured.tuned[task], ItemScores)]
    if unknown:
        notes.append(f"no intervals where {', '.join(unknown)} counts: its score is no mean of item scores")
    few = [task for task in tasks if isinstance(cell := measured.tuned[task], ItemScores) and len(cell.ids) < 2]
    if few:
        notes.append(f"no intervals: {', '.join(few)} has one item, and one item says nothing about others")
    references = [(_BASE, measured.base, measured.knowledge)]
    if measured.full_fine_tuning is not None:
        references.append((_FULL, measured.full_fine_tuning, measured.task))
    for whose, cells, needed in references:
        fixed = [task for task in needed if not isinstance(cells[task], ItemScores) and task not in unknown]
        if fixed:
            notes.append(f"intervals take the score of {whose} on {', '.join(fixed)} as exact: its items are not known")
        other = [
            task
            for task in needed
            if isinstance(cell := cells[task], ItemScores)
            and isinstance(tuned := measured.tuned[task], ItemScores)
            and cell.ids != tuned.ids
        ]
        if other:
            notes.append(
                f"{whose} answered other items of {', '.join(other)}: intervals are not paired there, and wider"
            )
    flat = [name for name, interval in found.items() if interval.low == interval.high]
    if flat:
        notes.append(
            f"the interval of {', '.join(flat)} has no width: all items came out alike, so that resampling them shows "
            "nothing; other questions may come out otherwise"
        )
    return notes
