"""Which rows each step sees, fixed before training: independent of ranks, micro-batches and resumption."""

import math
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from harness.config import TrainConfig
from harness.data.sampling import seed_for
from harness.data.tokenisation import Row


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimiser steps of the run: ``max_steps`` if given, else as many as cover ``epochs`` passes."""
    return config.max_steps or math.ceil(config.epochs * rows / config.batch_size)


class ScheduledRows(Dataset):
    """The rows of the whole run in order: one seeded permutation per pass, cut into steps of ``batch_size``.

    Read sequentially, global batch k is items k·B to (k+1)·B whatever the number of ranks, so Trainer sees one
    epoch and resuming is skipping.
    """

    def __init__(self, rows: Sequence[Row], steps: int, batch_size: int, seed: int) -> None:
        self._rows = rows
        order: list[int] = []
        passes = math.ceil(steps * batch_size / len(rows))
        for number in range(passes):
            generator = torch.Generator().manual_seed(seed_for("rows", seed, number))
            order += torch.randperm(len(rows), generator=generator).tolist()
        self._order = order[: steps * batch_size]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Row:
        return self._rows[self._order[index]]
