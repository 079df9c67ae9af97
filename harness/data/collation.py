"""From rows of different lengths to one padded batch."""

from collections.abc import Sequence
from typing import Literal

import torch

from harness.data.tokenisation import IGNORED, Row

Batch = dict[str, torch.Tensor]


def collate(rows: Sequence[Row], pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """Pad ``rows`` to the longest: ``input_ids``, ``attention_mask`` and ``labels``, each of shape (rows, length)."""
    length = max(len(row.input_ids) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        padding = [filler] * (length - len(values))
        return values + padding if side == "right" else padding + values

    return {
        "input_ids": torch.tensor([pad(row.input_ids, pad_id) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row.input_ids), 0) for row in rows]),
        "labels": torch.tensor([pad(row.labels, IGNORED) for row in rows]),
    }


def stack(first: Batch, second: Batch, pad_id: int) -> Batch:
    """One right-padded batch: the rows of ``first``, then the rows of ``second``."""
    length = max(first["input_ids"].shape[1], second["input_ids"].shape[1])
    fillers = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    return {
        key: torch.cat(
            [
                torch.nn.functional.pad(batch[key], (0, length - batch[key].shape[1]), value=filler)
                for batch in (first, second)
            ]
        )
        for key, filler in fillers.items()
    }
