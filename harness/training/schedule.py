"""Which rows each step sees, fixed before training: independent of ranks, micro-batches and resumption.

With replay a share of the places in the batches goes to other rows. Item p of the run is a replayed one exactly where
⌊(p + 1)·ratio⌋ > ⌊p·ratio⌋, so any n consecutive items hold n·ratio of them, within one; the ratio is the decimal
number that was written, not its binary neighbour. The rows of the task keep the order that they have without replay.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch.utils.data import Dataset

from harness.config import TrainConfig
from harness.data.sampling import seed_for
from harness.data.tokenisation import Row


def total_steps(config: TrainConfig, rows: int, replay_ratio: float = 0.0) -> int:
    """Optimiser steps of the run: ``max_steps`` if given, else as many as cover ``epochs`` passes over the task."""
    if config.max_steps is not None or replay_ratio == 0:
        return config.max_steps or math.ceil(config.epochs * rows / config.batch_size)
    of_the_task = config.batch_size * (1 - _exact(replay_ratio))
    return math.ceil(_exact(config.epochs) * rows / of_the_task)


class ScheduledRows(Dataset):
    """The rows of the whole run in order: one seeded permutation per pass, cut into steps of ``batch_size``.

    Read sequentially, global batch k is items k·B to (k+1)·B whatever the number of ranks, so Trainer sees one
    epoch and resuming is skipping.

    Args:
        rows: what is learned.
        replay, replay_ratio: other rows, and the share of the places that they take, in [0, 1). They are drawn by
            permutations of their own, pass by pass.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        steps: int,
        batch_size: int,
        seed: int,
        replay: Sequence[Row] = (),
        replay_ratio: float = 0.0,
    ) -> None:
        self._rows, self._replay = rows, replay
        self.steps = steps
        self._length = steps * batch_size
        self._ratio = _exact(replay_ratio) if replay else Fraction(0)
        replayed = self._replayed_before(self._length)
        self._order = _passes("rows", seed, len(rows), self._length - replayed)
        self._replay_order = _passes("replay", seed, len(replay), replayed)

    @property
    def epochs_per_step(self) -> float:
        """Passes over what is learned, per step."""
        return self._length * float(1 - self._ratio) / (self.steps * len(self._rows))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return self.row(self.number(index))

    def number(self, item: int) -> int:
        """Which row item ``item`` of the run is; those that are replayed are counted after those of the task."""
        replayed = self._replayed_before(item)
        if self._replayed_before(item + 1) > replayed:
            return len(self._rows) + self._replay_order[replayed]
        return self._order[item - replayed]

    def row(self, number: int) -> Row:
        """The row of that number."""
        return self._rows[number] if number < len(self._rows) else self._replay[number - len(self._rows)]

    def _replayed_before(self, item: int) -> int:
        """How many of the items before ``item`` are replayed ones."""
        return item * self._ratio.numerator // self._ratio.denominator


def _passes(name: str, seed: int, rows: int, count: int) -> list[int]:
    """``count`` numbers below ``rows``: permutations one after the other, the last one cut."""
    order: list[int] = []
    for number in range(math.ceil(count / rows) if count else 0):
        generator = torch.Generator().manual_seed(seed_for(name, seed, number))
        order += torch.randperm(rows, generator=generator).tolist()
    return order[:count]


def _exact(number: float) -> Fraction:
    """The number as it is written in decimals."""
    return Fraction(str(number))
