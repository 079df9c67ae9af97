"""The penalty protocol: a term in the loss that lies over any method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from harness.config import Strict
from harness.data.collation import Batch
from harness.data.tokenisation import Row


@dataclass(frozen=True)
class MicroStep:
    """Where in training a forward pass stands. A step has ``parts`` passes: accumulation × ranks; this is ``part``."""

    step: int
    part: int
    parts: int


@dataclass(frozen=True)
class PenaltySetup:
    """What a penalty may need: tokenised preserve prompts, the padding token, the run's seed."""

    preserve: Sequence[Row]
    pad_id: int
    seed: int


class Penalty:
    """A penalty. `rows` may add rows to a forward pass; `penalty` then sees the logits of exactly those rows.

    The value returned by `penalty` is this pass's share of the step's penalty: shares of all passes of a step, on
    all ranks, add up to it.
    """

    Options: ClassVar[type[Strict]] = Strict
    needs_preserve: ClassVar[bool] = False
    needs_original_model: ClassVar[bool] = False
    metric: ClassVar[str] = "penalty"

    def __init__(self, options: Any, setup: PenaltySetup) -> None:
        self.options = options
        self.setup = setup

    @property
    def weight(self) -> float:
        """The factor of the term in the loss; at 0 the penalty is left out altogether."""
        raise TypeError(f"{type(self).__name__} does not say its weight")

    def rows(self, at: MicroStep) -> Batch | None:
        """Rows that ride in the forward pass of the batch, or None."""
        return None

    def before(self, model: nn.Module, at: MicroStep, rows: Batch | None) -> Any:
        """Called before the differentiated forward pass; what it returns is handed to `penalty`."""
        return None

    def penalty(
        self, model: nn.Module, at: MicroStep, rows: Batch | None, logits: torch.Tensor | None, prepared: Any
    ) -> torch.Tensor | None:
        """This pass's share of the unweighted term, or None.

        Args:
            model: the engine or model, in training mode.
            rows: what `rows` returned; ``logits`` (rows, length, vocabulary): the model's outputs on them.
            prepared: what `before` returned.
        """
        return None
