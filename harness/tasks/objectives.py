"""What is minimised: which of a model's outputs are compared with which labels.

Everything that looks at a loss goes through here: training, its Fisher statistics, the loss on preserve rows. An
objective counts *items*: tokens with a label, rows with a class, the two ends of a span.
"""

from typing import Any

import torch
from torch import nn

from harness.data.collation import Batch
from harness.data.tokenisation import IGNORED


class Objective:
    """Cross-entropy of one item after the other; subclasses say where the items are."""

    def logits(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """What of the model's outputs on ``batch`` is compared, rows first."""
        return outputs.logits

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """Which items count, bool, (rows, items)."""
        raise TypeError(f"{type(self).__name__} does not say which items count")

    def compared(self, logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """The outputs of the counted items, row by row, (N, V)."""
        raise TypeError(f"{type(self).__name__} does not say which outputs are compared")

    def targets(self, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Their labels, (N,)."""
        raise TypeError(f"{type(self).__name__} does not say what they are compared with")

    def between(self, outputs_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """The loss of all items together, fp32 at least."""
        return nn.functional.cross_entropy(_wide(outputs_NV), targets_N, reduction="sum")

    def right(self, outputs_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """How many items come out right; a tie for the largest output counts as its first."""
        return (outputs_NV.argmax(-1) == targets_N).sum()

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of the loss over the counted items of a batch."""
        counted = self.counted(labels)
        return self.between(self.compared(logits, counted), self.targets(labels, counted))

    def drawn(self, outputs_NV: torch.Tensor, uniform_N1: torch.Tensor) -> torch.Tensor:
        """A label for every item, drawn from the model's own distribution by numbers uniform in [0, 1), float64."""
        cumulative = outputs_NV.double().softmax(-1).cumsum(-1)
        found = torch.searchsorted(cumulative, uniform_N1 * cumulative[:, -1:], right=True)
        return found[:, 0].clamp_max(outputs_NV.shape[-1] - 1)


class NextToken(Objective):
    """Every labelled token is predicted at the token before it."""

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        return labels[:, 1:] != IGNORED

    def compared(self, logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return logits[:, :-1][counted]

    def targets(self, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return labels[:, 1:][counted]

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Without a selection: on an accelerator that would wait for the number of labels.
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )


class MaskedToken(Objective):
    """Every labelled token is predicted where it stands."""

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        return labels != IGNORED

    def compared(self, logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return logits[counted]

    def targets(self, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return labels[counted]


class RowClass(Objective):
    """Every row has a class."""

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)

    def compared(self, logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return logits

    def targets(self, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return labels


class RowNumber(RowClass):
    """Every row has a number: squared error, the likelihood of a normal distribution of variance 1/2 around it."""

    def between(self, outputs_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return (_wide(outputs_NV[:, 0]) - targets_N).square().sum()

    def right(self, outputs_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return torch.zeros(
            (), dtype=torch.long, device=outputs_NV.device
        )  # no prediction of a number is right or wrong

    def drawn(self, outputs_NV: torch.Tensor, uniform_N1: torch.Tensor) -> torch.Tensor:
        # The inverse of that distribution's function; at 0 it would be infinitely far away.
        return outputs_NV[:, 0].double() + torch.erfinv(2 * uniform_N1[:, 0].clamp_min(1e-12) - 1)


class Span(Objective):
    """Every row has the first and the last token of an answer: two items. Both at token 0: there is no answer."""

    def logits(self, outputs: Any, batch: Batch) -> torch.Tensor:
        ends = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)  # (rows, 2, length)
        # No answer ends in padding; with it a row's loss would depend on the length of others.
        padding = ~batch["attention_mask"].bool().unsqueeze(1)
        return ends.masked_fill(padding, torch.finfo(ends.dtype).min)

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def compared(self, logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return logits.flatten(0, 1)

    def targets(self, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return labels.flatten()


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


NEXT_TOKEN = NextToken()
