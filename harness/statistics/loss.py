"""The loss that gradient statistics are of: −log p of a row's response, summed over its tokens."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from harness.data.collation import Batch
from harness.data.sampling import seed_for
from harness.statistics.collector import Tokens, not_finite


@dataclass(frozen=True)
class Labels:
    """Whose labels: the data's (``empirical``), or drawn from the model's prediction (``mc``) by ``seed``."""

    fisher: Literal["empirical", "mc"] = "empirical"
    seed: int = 0


def response_loss(logits_BLV: torch.Tensor, tokens: Tokens, labels: Labels) -> torch.Tensor:
    """Summed over the response tokens of a batch, in fp32.

    Raises:
        UserError: it is NaN or inf.
    """
    has_loss = tokens.has_loss_BL.to(logits_BLV.device)
    logits_TV = logits_BLV[:, :-1][has_loss].float()  # of the tokens with a loss alone: the rest would be most of them
    if labels.fisher == "empirical":
        targets = tokens.batch["labels"][:, 1:][tokens.has_loss_BL].to(logits_BLV.device)
    else:
        targets = _drawn(logits_TV.detach(), tokens.has_loss_BL, tokens.batch, labels.seed)
    loss = nn.functional.cross_entropy(logits_TV, targets, reduction="sum")
    if not torch.isfinite(loss):
        raise not_finite("the loss", tokens.number)
    return loss


def _drawn(logits_TV: torch.Tensor, has_loss: torch.Tensor, batch: Batch, seed: int) -> torch.Tensor:
    """A token for every row of ``logits_TV``, drawn from softmax of that row."""
    drawn = []
    rows = zip(batch["input_ids"], batch["attention_mask"], logits_TV.split(has_loss.sum(1).tolist()), strict=True)
    for ids, mask, logits in rows:
        generator = torch.Generator().manual_seed(seed_for("mc", seed, ids[mask.bool()].tolist()))
        # One uniform number per token through the inverse of the distribution function: rounding, which differs with
        # batch size and device, moves a draw only where it falls on the edge between two tokens.
        uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        drawn.append(token[:, 0].clamp_max(logits.shape[-1] - 1))
    return torch.cat(drawn)
