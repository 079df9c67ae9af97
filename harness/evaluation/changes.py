"""Which answers were kept, lost and gained between two models that answered the same items."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from harness.evaluation.items import Item
from harness.evaluation.significance import sign_test

RIGHT = 0.5  # an item's score from which its answer counts as right; metrics of right and wrong are 1 and 0


@dataclass(frozen=True)
class Change:
    """An answer that became right or wrong."""

    id: str
    question: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Changes:
    """The answers of one task before and after.

    Attributes:
        kept: right before and after.
        wrong: wrong before and after.
        lost: right before, wrong after, in the order of the items.
        gained: wrong before, right after.
        p_value: of McNemar's exact test, two-sided: losses and gains equally likely.
    """

    task: str
    kept: int
    wrong: int
    lost: tuple[Change, ...]
    gained: tuple[Change, ...]
    p_value: float

    @property
    def items(self) -> int:
        """All items that both answered."""
        return self.kept + self.wrong + len(self.lost) + len(self.gained)


def changes(task: str, before: Sequence[Item], after: Sequence[Item]) -> Changes | None:
    """Compare the answers to the items that both models have.

    Returns:
        None where they have none in common, or an item's score is not known or lies outside [0, 1].
    """
    earlier = {item.id: item for item in before}
    pairs = [(earlier[item.id], item) for item in after if item.id in earlier]
    if not pairs or any(item.score is None or not 0 <= item.score <= 1 for pair in pairs for item in pair):
        return None
    sorted_out: dict[tuple[bool, bool], list[Change]] = {}
    for old, new in pairs:
        change = Change(new.id, new.question, new.expected, old.answer, new.answer)
        sorted_out.setdefault((_is_right(old), _is_right(new)), []).append(change)
    lost, gained = sorted_out.get((True, False), []), sorted_out.get((False, True), [])
    return Changes(
        task=task,
        kept=len(sorted_out.get((True, True), [])),
        wrong=len(sorted_out.get((False, False), [])),
        lost=tuple(lost),
        gained=tuple(gained),
        p_value=sign_test(len(gained), len(lost)),
    )


def examples(found: Sequence[Change], count: int = 3, seed: int = 0) -> tuple[Change, ...]:
    """``count`` of the changes, drawn without choice by ``seed`` and in the order of the items."""
    places = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    return tuple(found[place] for place in sorted(places))


def _is_right(item: Item) -> bool:
    return item.score is not None and item.score >= RIGHT
