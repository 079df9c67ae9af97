"""Loss and token accuracy on given rows, over all ranks: what forgetting is first seen by."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from harness.data.collation import LABELS, collate
from harness.data.tokenisation import Row
from harness.models.calling import arguments
from harness.tasks.objectives import NEXT_TOKEN, Objective
from harness.training.distributed import rank, world_size


class TokenMeans(NamedTuple):
    """Means over labelled tokens (or other items): ``loss`` (nats), and ``accuracy``, the share that is right."""

    loss: float
    accuracy: float


def token_means(
    model: nn.Module, rows: Sequence[Row], pad_id: int, batch_size: int, objective: Objective = NEXT_TOKEN
) -> TokenMeans:
    """Mean loss and accuracy over the labelled items of ``rows``, over all ranks, dropout off. Collective.

    Both come from the same forward passes.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    with torch.no_grad():
        # Every rank makes the same number of passes, as ZeRO-3 needs; a rank without rows repeats one, uncounted.
        for start in range(0, len(rows), batch_size * world_size()):
            mine = rows[start : start + batch_size * world_size()][rank() :: world_size()]
            batch = {k: v.to(device) for k, v in collate(mine or rows[:1], pad_id).items()}
            logits = objective.logits(model(**arguments(model, batch)), batch)
            if mine:
                counted = objective.counted(batch[LABELS])
                sums[0] += objective.loss(logits, batch[LABELS]).double()
                found, targets = objective.compared(logits, counted), objective.targets(batch[LABELS], counted)
                sums[1] += objective.right(found, targets)
                sums[2] += counted.sum()
    model.train(training)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    loss, right, tokens = sums.tolist()
    return TokenMeans(loss / tokens if tokens else float("nan"), right / tokens if tokens else float("nan"))
