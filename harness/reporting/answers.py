"""The answers of a run's models: which were kept, lost and gained, and what two runs are compared by."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from harness.evaluation.bootstrap import Cell
from harness.evaluation.changes import Change, Changes, changes, examples
from harness.evaluation.intervals import Measured, full_fine_tuning_cells
from harness.evaluation.items import Item, item_scores, read_items
from harness.reporting import wording
from harness.reporting.records import EvaluatedModel, Evaluation, RunRecord
from harness.reporting.tables import Table
from harness.run_directory import RunDirectory

NOT_KEPT = (
    "This evaluation kept no answers (an earlier version of the harness made it), so there are no intervals and no "
    "counts of kept, lost and gained answers. Evaluate the run again to have them."
)
_LENGTH = 400  # characters of a text that an example shows
_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SAME = 1e-6  # a task's score and the mean over its items


@dataclass(frozen=True)
class Example:
    """A lost or gained answer as it is shown."""

    what: str
    question: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class TaskExamples:
    """Some of the answers of one task that changed, and how many there are."""

    task: str
    lost: int
    gained: int
    examples: tuple[Example, ...]


def read_answers(record: RunRecord, model: EvaluatedModel) -> dict[str, list[Item]]:
    """The items of an evaluated model by task, only of tasks whose score they bear out.

    Files that belong to another evaluation than ``eval/results.json`` are thus not mixed with it.
    """
    kept = read_items(RunDirectory(record.path).items / f"{model.name}.jsonl")
    return {task: items for task, items in kept.items() if task in model.scores and _bear_out(items, model, task)}


def _bear_out(items: list[Item], model: EvaluatedModel, task: str) -> bool:
    scores = item_scores(items)
    return scores is None or abs(scores.mean - model.scores[task].value) <= _SAME


def read_changes(record: RunRecord) -> list[Changes]:
    """Base against final model, task by task, where both kept their answers."""
    evaluation = record.evaluation
    if evaluation is None or evaluation.base is None or evaluation.final is None:
        return []
    before, after = read_answers(record, evaluation.base), read_answers(record, evaluation.final)
    found = (changes(task, before.get(task, []), after.get(task, [])) for task in evaluation.tasks)
    return [change for change in found if change is not None]


def changes_table(evaluation: Evaluation, found: list[Changes]) -> Table | None:
    """Counts by task; None where no answers were kept."""
    if not found:
        return None
    kinds = {name: "task" for name in evaluation.task} | {name: "knowledge" for name in evaluation.knowledge}
    return Table(
        headers=("task", "kind", "items", "kept", "lost", "gained", "still wrong", "gained − lost", "p"),
        hints=("", "", "answered by both", "right, right", "right, wrong", "wrong, right", "wrong, wrong", "", "exact"),
        rows=tuple(
            (
                one.task,
                kinds[one.task],
                *(wording.number(count, 0) for count in (one.items, one.kept, len(one.lost), len(one.gained))),
                wording.number(one.wrong, 0),
                wording.signed(len(one.gained) - len(one.lost), 0),
                wording.probability(one.p_value),
            )
            for one in found
        ),
        name="changes",
        text=frozenset({0, 1}),
        data=tuple(
            {
                "task": one.task,
                "kind": kinds[one.task],
                "items": one.items,
                "kept": one.kept,
                "lost": len(one.lost),
                "gained": len(one.gained),
                "still_wrong": one.wrong,
                "p_value": one.p_value,
            }
            for one in found
        ),
    )


def changed_answers(found: list[Changes]) -> Table | None:
    """Every lost and gained answer, for the CSV; None where there is none."""
    every = [(one.task, what, change) for one in found for what in ("lost", "gained") for change in _changed(one, what)]
    if not every:
        return None
    headers = ("task", "change", "id", "question", "expected", "before", "after")
    rows = tuple(
        (task, what, change.id, *map(visible, (change.question, change.expected, change.before, change.after)))
        for task, what, change in every
    )
    return Table(headers, rows, name="changed_answers", text=frozenset(range(len(headers))))


def shown_examples(found: list[Changes], count: int = 3) -> list[TaskExamples]:
    """Up to ``count`` lost and as many gained answers of each task, drawn without choice."""
    return [
        TaskExamples(
            one.task,
            len(one.lost),
            len(one.gained),
            tuple(
                Example(what, *map(excerpt, (change.question, change.expected, change.before, change.after)))
                for what in ("lost", "gained")
                for change in examples(_changed(one, what), count)
            ),
        )
        for one in found
        if one.lost or one.gained
    ]


def _changed(one: Changes, what: str) -> tuple[Change, ...]:
    return one.lost if what == "lost" else one.gained


def visible(text: str) -> str:
    """Text without what a page cannot hold or what would disturb it: controls, halves of characters, bidi overrides."""
    return "".join("\ufffd" if _disturbs(letter) else letter for letter in text)


def _disturbs(letter: str) -> bool:
    if letter in "\n\t":
        return False
    return unicodedata.category(letter) in ("Cc", "Cs") or letter in _OVERRIDES


def excerpt(text: str, length: int = _LENGTH) -> str:
    """The text, or its beginning and its end where it is long; words where it is empty."""
    text = visible(text).strip()
    if len(text) > length:
        head = length * 2 // 3
        text = f"{text[:head]} […] {text[head - length :]}"
    return text or "(nothing)"


def measured(record: RunRecord) -> Measured | None:
    """What K and T of the final model are made of; None where it, the base or the reference of T is not known."""
    evaluation = record.evaluation
    if evaluation is None or evaluation.base is None or evaluation.final is None:
        return None
    if any(name not in evaluation.final.scores for name in evaluation.tasks):
        return None
    if any(name not in evaluation.base.scores for name in evaluation.knowledge):
        return None
    full = None
    if evaluation.T_reference is not None:
        if evaluation.T_reference_scores is None:
            return None
        full = full_fine_tuning_cells(evaluation.T_reference, evaluation.T_reference_scores)
    return Measured(
        evaluation.knowledge,
        evaluation.task,
        _cells(record, evaluation.final),
        _cells(record, evaluation.base),
        full,
    )


def _cells(record: RunRecord, model: EvaluatedModel) -> Mapping[str, Cell]:
    kept = read_answers(record, model)
    cells: dict[str, Cell] = {}
    for task, score in model.scores.items():
        scores = item_scores(kept.get(task, []))
        cells[task] = score.value if scores is None else scores
    return cells
