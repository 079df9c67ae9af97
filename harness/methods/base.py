"""The method protocol: what a fine-tuning method tells the pipeline. Every part has a do-nothing default.

A method is built from its own options and is asked, stage by stage: what statistics it needs, which rank each
layer gets, the adapter tensors at step 0, how the model carries them, what it adds to the loss, what it does after an
optimiser step, and the exact weight update at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from harness.config import Strict
from harness.models.targets import Layer
from harness.statistics.covariance import InputCovariance


@dataclass(frozen=True)
class StatisticsRequest:
    """What to collect, on which data, in how many independent sampling rounds."""

    kind: Literal["input_covariance"]
    data: Literal["preserve", "target"]
    rounds: int = 1


class Statistics(Protocol):
    """Collected statistics, read one layer at a time."""

    def input_covariance(self, layer: str) -> InputCovariance: ...


@dataclass(frozen=True)
class AdapterInit:
    """An adapter at step 0: ``A`` (rank, in) and ``B`` (out, rank), fp32.

    ``residual``: the base weight becomes the residual weight W − scaling·B·A, so that the model computes at step 0
    what the base computes. ``report``: numbers for ``init/report.json``.
    """

    A: torch.Tensor
    B: torch.Tensor
    residual: bool
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LowRank:
    """A weight update in factored form: ΔW = scaling · B @ A, with ``B`` (out, r) and ``A`` (r, in)."""

    B: torch.Tensor
    A: torch.Tensor
    scaling: float

    def dense(self) -> torch.Tensor:
        """ΔW itself, (out, in), in the factors' dtype."""
        return self.scaling * (self.B @ self.A)


class Method:
    """A fine-tuning method. Subclasses set ``summary`` and ``Options`` and override what they do differently."""

    Options: ClassVar[type[Strict]] = Strict
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    trains_base: ClassVar[bool] = False  # True: the base weights are trained and there is no adapter

    def __init__(self, options: Any, seed: int = 0) -> None:
        self.options = options
        self.seed = seed

    def statistics(self) -> StatisticsRequest | None:
        """What to collect before initialisation; None where the method looks at no data."""
        return None

    def ranks(self, layers: Sequence[Layer], statistics: Statistics | None) -> dict[str, int]:
        """The rank of each layer; a layer that is left out or has rank 0 gets no adapter."""
        return {}

    def initialise(self, layer: Layer, weight: torch.Tensor, rank: int, statistics: Statistics | None) -> AdapterInit:
        """Adapter tensors of one layer at step 0 from its base ``weight`` (out, in)."""
        raise TypeError(f"{type(self).__name__} has no adapter to initialise")

    def scaling(self) -> float:
        """The factor s of ΔW = s·B·A, the same for every layer whatever its rank."""
        return 1.0

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """The model with its adapters (PEFT LoRA by default), tensors not yet loaded."""
        from harness.adapters.lora import attach_lora

        return attach_lora(model, ranks, self.scaling())

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """A term of the method's own, added to the loss at every step."""
        return None

    def after_step(self, model: nn.Module) -> None:
        """A projection after the optimiser step."""

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups; by default every trainable parameter in one."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trainable, "weight_decay": weight_decay}]

    def delta(self, trained: LowRank, initial: LowRank | None) -> LowRank:
        """The exact update of the *original* base weight.

        ``initial`` is given where the base weight became the residual W − s·B₀A₀: the update is then
        s·(B A − B₀ A₀) = s·[B, −B₀]·[A; A₀], of rank 2r.
        """
        if initial is None:
            return trained
        return LowRank(
            torch.cat([trained.B, -initial.B], dim=1), torch.cat([trained.A, initial.A], dim=0), trained.scaling
        )
