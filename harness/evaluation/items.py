"""What a model answered, item by item: kept beside the scores, so that two models can be compared on the same items.

``eval/items/<model>.jsonl`` has one line for each item of each task. A task's item scores are those whose mean is the
task's score; a task whose score is no such mean (a corpus metric, a group that weighs its tasks otherwise) has items
without scores.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.files import write_text


@dataclass(frozen=True)
class Item:
    """One item of a task and what became of it.

    Attributes:
        id: the item's place in its data set and a checksum of its content: equal ids are equal questions.
        score: the metric on this item; None where the task's score is no mean of item scores.
        question: the item's own part of the prompt, without few-shot examples.
        expected: the right answer; several are separated by " | ".
        answer: what the model answered, after the task's filters; for a multiple choice the chosen one.
    """

    id: str
    score: float | None
    question: str
    expected: str
    answer: str


@dataclass(frozen=True)
class ItemScores:
    """Scores of one model on the items of one task, in the order of ids: ``values`` [items], float64."""

    ids: tuple[str, ...]
    values: np.ndarray

    @property
    def mean(self) -> float:
        """The task's score."""
        return float(self.values.mean())


def item_scores(items: Iterable[Item]) -> ItemScores | None:
    """The scores of ``items`` sorted by id; None where there are no items or one has no score."""
    ordered = sorted(items, key=lambda item: item.id)
    if not ordered or any(item.score is None for item in ordered):
        return None
    return ItemScores(tuple(item.id for item in ordered), np.array([item.score for item in ordered], dtype=np.float64))


def items_of(
    task: Any, samples: Sequence[Mapping[str, Any]], metric: str, scored: bool, prefix: str = ""
) -> list[Item]:
    """The items of lm-eval's ``task`` from its logged ``samples`` of one filter.

    Args:
        metric: the metric that is the item's score.
        scored: whether the task's score is the mean of that metric over items.
        prefix: stands before each id, where the items of several tasks come together.
    """
    return [
        Item(
            id=f"{prefix}{sample['doc_id']}-{sample['doc_hash'][:12]}",
            score=float(sample[metric]) if scored else None,
            question=_question(task, sample),
            expected=_expected(task, sample),
            answer=_answer(task, sample, metric),
        )
        for sample in samples
    ]


def write_items(path: Path, items: Mapping[str, Sequence[Item]]) -> None:
    """Write the items of every task as JSON lines, atomically."""
    lines = (
        json.dumps({"task": task, **asdict(item)}, ensure_ascii=False) for task, some in items.items() for item in some
    )
    # Halves of characters, which a data set may hold, have no UTF-8.
    write_text(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace").decode("utf-8"))


def read_items(path: Path) -> dict[str, list[Item]]:
    """The items of every task; none where ``path`` is missing (an evaluation of an earlier version).

    Raises:
        UserError: the file is damaged.
    """
    found: dict[str, list[Item]] = {}
    if not path.is_file():
        return found
    # Split at line feeds only: an answer may hold other characters that Python counts as ends of lines.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            content = json.loads(line)
            found.setdefault(content.pop("task"), []).append(Item(**content))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: line {number} is no item ({error}); evaluate the run again") from error
    return found


def _question(task: Any, sample: Mapping[str, Any]) -> str:
    own = task.doc_to_text(sample["doc"])
    # A task with several inputs (Winogrande) has no text of its own: its first request says most.
    return own.strip() if isinstance(own, str) else str(sample["arguments"][0][0]).strip()


def _expected(task: Any, sample: Mapping[str, Any]) -> str:
    target, choices = sample["target"], _choices(task, sample)
    if choices and isinstance(target, int) and 0 <= target < len(choices):
        return choices[target].strip()
    several = target if isinstance(target, list | tuple) else [target]
    return " | ".join(
        (choices[one] if choices and isinstance(one, int) and 0 <= one < len(choices) else str(one)).strip()
        for one in several
    )


def _answer(task: Any, sample: Mapping[str, Any], metric: str) -> str:
    choices, responses = _choices(task, sample), sample["filtered_resps"]
    if choices and len(responses) >= len(choices):
        # acc_norm compares log-likelihoods per character, as lm-eval does.
        sizes = [(len(choice) or 1) if metric == "acc_norm" else 1 for choice in choices]
        found = [float(response[0]) / size for response, size in zip(responses, sizes, strict=False)]
        return choices[found.index(max(found))].strip()
    first = responses[0] if responses else ""
    first = first[0] if isinstance(first, list) and first else first
    return first.strip() if isinstance(first, str) else str(first)


def _choices(task: Any, sample: Mapping[str, Any]) -> list[str]:
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.doc_to_choice is None:
        return []
    return [str(choice) for choice in task.doc_to_choice(sample["doc"])]
