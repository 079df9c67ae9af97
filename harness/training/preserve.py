"""Loss and token accuracy on given rows, over all ranks: what forgetting is first seen by."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from harness.data.collation import collate
from harness.data.tokenisation import IGNORED, Row
from harness.training.distributed import rank, world_size
from harness.training.trainer import response_loss


class TokenMeans(NamedTuple):
    """Means over labelled tokens: next-token ``loss`` (nats), and ``accuracy``, the share whose argmax is right."""

    loss: float
    accuracy: float


def token_means(model: nn.Module, rows: Sequence[Row], pad_id: int, batch_size: int) -> TokenMeans:
    """Mean next-token loss and accuracy over the labelled tokens of ``rows``, over all ranks, dropout off. Collective.

    Both come from the same forward passes. A tie for the largest logit counts as its first token.
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
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            if mine:
                following = batch["labels"][:, 1:]
                sums[0] += response_loss(logits, batch["labels"]).double()
                # No label of `IGNORED` equals a token.
                sums[1] += (logits[:, :-1].argmax(-1) == following).sum()
                sums[2] += (following != IGNORED).sum()
    model.train(training)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    loss, right, tokens = sums.tolist()
    return TokenMeans(loss / tokens if tokens else float("nan"), right / tokens if tokens else float("nan"))
