"""From rows of different lengths to one padded batch."""

from collections.abc import Sequence
from typing import Literal

import torch

from harness.data.tokenisation import IGNORED, Row

Batch = dict[str, torch.Tensor]
LABELS = "labels"  # of a batch: everything else is read by the model


def collate(rows: Sequence[Row], pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """One batch of ``rows``, padded to the longest.

    Of rows with tokens: ``input_ids``, ``attention_mask`` and the rows' columns, each of shape (rows, length).
    ``labels``: (rows, length), or of rows that have one answer (rows,), or (rows, 2) for spans. And the rows' own
    tensors.
    """
    length = max(len(row.input_ids) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        padding = [filler] * (length - len(values))
        return values + padding if side == "right" else padding + values

    batch: Batch = {}
    if length:
        batch["input_ids"] = torch.tensor([pad(row.input_ids, pad_id) for row in rows])
        batch["attention_mask"] = torch.tensor([pad([1] * len(row.input_ids), 0) for row in rows])
        for name in rows[0].columns:
            batch[name] = torch.tensor([pad(row.columns[name], 0) for row in rows])
    if rows[0].answer is not None:
        batch[LABELS] = torch.tensor([row.answer for row in rows])
    elif length:
        batch[LABELS] = torch.tensor([pad(row.labels, IGNORED) for row in rows])
    own = [row.tensors() for row in rows]
    for name in {name: None for tensors in own for name in tensors}:
        batch[name] = torch.cat([tensors[name] for tensors in own if name in tensors])
    return batch


def model_inputs(batch: Batch) -> Batch:
    """What of a batch the model reads."""
    return {name: tensor for name, tensor in batch.items() if name != LABELS}


def size_of(batch: Batch) -> int:
    """The rows of a batch."""
    return len(batch["input_ids"] if "input_ids" in batch else batch[LABELS])


def stack(first: Batch, second: Batch, pad_id: int) -> Batch:
    """One right-padded batch of rows with tokens: the rows of ``first``, then the rows of ``second``."""
    length = max(first["input_ids"].shape[1], second["input_ids"].shape[1])
    fillers = {"input_ids": pad_id, LABELS: IGNORED}
    by_token = {name for batch in (first, second) for name, t in batch.items() if t.shape == batch["input_ids"].shape}

    def padded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in by_token:
            return tensor
        return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=fillers.get(name, 0))

    return {
        name: torch.cat([padded(name, batch[name]) for batch in (first, second) if name in batch])
        for name in {**first, **second}
    }
