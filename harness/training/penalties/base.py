"""The penalty protocol: what can be laid over any method: a term in the loss, or a change of the gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from harness.config import Strict
from harness.data.collation import Batch
from harness.data.tokenisation import Row

if TYPE_CHECKING:
    from harness.methods.base import Method
    from harness.tasks.base import Task
    from harness.training.schedule import ScheduledRows


@dataclass(frozen=True)
class Needs:
    """What a penalty cannot do without.

    Attributes:
        preserve: rows of ``data.preserve``.
        original_model: the original model's outputs while training.
        adapter: an adapter, to whose weights it applies.
        pair_alone: an adapter that trains the A and B of linear layers and nothing else.
        preparation: something to be computed once before training (`Penalty.prepare`).
        answers: rows of ``data.preserve`` with answers that the original model gave (the stage ``answers``).
    """

    preserve: bool = False
    original_model: bool = False
    adapter: bool = False
    pair_alone: bool = False
    preparation: bool = False
    answers: bool = False


@dataclass(frozen=True)
class MicroStep:
    """Where in training a forward pass stands. A step has ``parts`` passes: accumulation × ranks; this is ``part``."""

    step: int
    part: int
    parts: int


@dataclass(frozen=True)
class PenaltySetup:
    """What a penalty may need in training.

    Attributes:
        preserve: tokenised preserve rows, with sampled answers where the penalty needs those.
        pad_id: the padding token.
        seed: of the run.
        steps: optimiser steps of the run.
        training: the rows of the whole run, in the order in which steps take them.
        prepared: what `Penalty.prepare` returned, read back from the run directory.
    """

    preserve: Sequence[Row]
    pad_id: int
    seed: int
    steps: int = 0
    training: "ScheduledRows | None" = None
    prepared: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Preparation:
    """What `Penalty.prepare` looks at: everything as it is at step 0, before there is an engine.

    ``model`` carries the method's adapters with the tensors of step 0 (residual base weights in place), whole on
    every rank, in evaluation mode. It computes what the original model computes, or, over a method that does not start
    there (`Method.starts_at_base`), does so inside `harness.adapters.lora.original_model`.
    """

    model: nn.Module
    method: "Method"
    task: "Task"


class Penalty:
    """A penalty. `rows` may add rows to a forward pass; `penalty` then sees the logits of exactly those rows.

    The value returned by `penalty` is this pass's share of the step's penalty: shares of all passes of a step, on
    all ranks, add up to it.
    """

    Options: ClassVar[type[Strict]] = Strict
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    metric: ClassVar[str] = "penalty"

    def __init__(self, options: Any, setup: PenaltySetup) -> None:
        self.options = options
        self.setup = setup

    @classmethod
    def needs(cls, options: Any) -> Needs:
        """What it needs under these options."""
        return Needs()

    @property
    def weight(self) -> float:
        """The factor of the term in the loss; at 0 the penalty is left out altogether."""
        raise TypeError(f"{type(self).__name__} does not say its weight")

    def weight_at(self, step: int) -> float:
        """The factor at optimiser step ``step`` (from 0) where it changes over training."""
        return self.weight

    def prepare(self, preparation: Preparation) -> dict[str, torch.Tensor]:
        """What is computed once before training; called on all ranks, kept by rank 0 under ``prepared/``.

        Every rank must return the same tensors.
        """
        return {}

    def attach(self, model: nn.Module) -> None:
        """Called once before the first step, with the model that is trained (inside the engine)."""

    def rows(self, at: MicroStep) -> Batch | None:
        """Rows that ride in the forward pass of the batch, or None."""
        return None

    def before(self, model: nn.Module, at: MicroStep, rows: Batch | None, batch: Batch) -> Any:
        """Called before the differentiated forward pass; what it returns is handed to `penalty` and `batch_penalty`.

        ``batch``: the training batch's own rows, without those that penalties add.
        """
        return None

    def penalty(
        self,
        model: nn.Module,
        at: MicroStep,
        rows: Batch | None,
        logits: torch.Tensor | None,
        prepared: Any,
    ) -> torch.Tensor | None:
        """This pass's share of the unweighted term, or None.

        Args:
            model: the engine or model, in training mode.
            rows: what `rows` returned; ``logits`` (rows, length, vocabulary): the model's outputs on them.
            prepared: what `before` returned.
        """
        return None

    def batch_penalty(
        self, model: nn.Module, at: MicroStep, batch: Batch, logits: torch.Tensor, prepared: Any
    ) -> torch.Tensor | None:
        """As `penalty`, of the training batch's own rows: ``logits`` (rows, length, vocabulary) of ``batch``."""
        return None

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called between the backward pass and optimiser step ``step`` (from 1), when gradients are complete.

        DeepSpeed's ``safe_get_full_grad`` and ``safe_set_full_grad`` read and write them, summed over passes and
        averaged over ranks, not yet clipped.
        """
