"""The loss that gradient statistics are of: −log p of a row's labels, summed over its items (tokens, of a response)."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from harness.data.collation import LABELS, Batch
from harness.data.sampling import seed_for
from harness.statistics.collector import Tokens, not_finite
from harness.tasks.objectives import NEXT_TOKEN, Objective


@dataclass(frozen=True)
class Labels:
    """Whose labels: the data's (``empirical``), or drawn from the model's prediction (``mc``) by ``seed``."""

    fisher: Literal["empirical", "mc"] = "empirical"
    seed: int = 0
    objective: Objective = NEXT_TOKEN


def labelled_loss(logits: torch.Tensor, tokens: Tokens, labels: Labels) -> torch.Tensor:
    """Summed over the items of a batch, in fp32.

    Args:
        logits: what `Objective.logits` takes from the model's outputs.

    Raises:
        UserError: it is NaN or inf.
    """
    objective = tokens.objective
    # Of the items with a loss alone: the rest would be most of them.
    outputs_NV = objective.compared(logits, tokens.counted.to(logits.device)).float()
    if labels.fisher == "empirical":
        targets = objective.targets(tokens.batch[LABELS], tokens.counted).to(logits.device)
    else:
        targets = _drawn(outputs_NV.detach(), objective, tokens.counted, tokens.batch, labels.seed)
    loss = objective.between(outputs_NV, targets)
    if not torch.isfinite(loss):
        raise not_finite("the loss", tokens.number)
    return loss


def _drawn(
    outputs_NV: torch.Tensor, objective: Objective, counted: torch.Tensor, batch: Batch, seed: int
) -> torch.Tensor:
    """A label for every item, drawn from the model's distribution."""
    uniform = []
    for content, count in zip(_contents(batch), counted.sum(1).tolist(), strict=True):
        generator = torch.Generator().manual_seed(seed_for("mc", seed, content))
        # One uniform number per item through the inverse of the distribution function: rounding, which differs with
        # batch size and device, moves a draw only where it falls on the edge between two labels.
        uniform.append(torch.rand(count, 1, generator=generator, dtype=torch.float64))
    return objective.drawn(outputs_NV, torch.cat(uniform).to(outputs_NV.device))


def _contents(batch: Batch) -> list[object]:
    """What tells rows from others: their real tokens, or the pixels of rows that are an image and nothing else."""
    if "input_ids" not in batch:
        return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch["pixel_values"]]
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
