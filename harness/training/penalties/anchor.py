"""The anchor: KL divergence from the original model, on preserve prompts or on the training rows themselves.

Learning without forgetting (Li & Hoiem, 2017) for language models: the loss gains β · T² · mean over tokens of
KL(p₀(·|x_{≤t}) ‖ p(·|x_{≤t})), where p₀ is the original model and both are taken at temperature T (Hinton et al. 2015,
whose T² keeps gradients of the same size as T changes; T = 1 is the plain divergence).

- ``data: preserve``: on a few preserve prompts per step, which ride in the same forward pass as the batch. Which ones
  depends on the seed and the step alone, so resuming, the number of ranks and gradient accumulation change nothing. The
  prompts of one pass over the preserve set are all different. ``data: train``: on the batch's own rows.
- ``tokens``: ``all`` positions, ``answer`` (those that predict a token of the answer), or ``last`` (the last of the
  prompt, which predicts the first token of the answer).
- ``reference: live``: the original model is never a second copy of the weights; it is the same model with adapters
  off, or, where the base became a residual, with the initial adapter in place, in an extra forward pass without
  gradients. ``cached``: its distributions were computed once, before training (`harness.training.original_cache`), and
  a step pays for the prompts in the batch alone.
"""

import inspect
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.config import AnchorConfig
from harness.data.collation import Batch, collate
from harness.data.sampling import sample, seed_for
from harness.data.tokenisation import IGNORED, Row
from harness.models.calling import arguments
from harness.training.divergence import Logits, Reference, summed_divergence, token_divergence
from harness.training.original_cache import OriginalCache, compute_cache
from harness.training.penalties.base import MicroStep, Needs, Penalty, PenaltySetup, Preparation

if TYPE_CHECKING:
    from harness.training.schedule import ScheduledRows

__all__ = ["Anchor", "original_logits", "positions", "token_divergence"]


@dataclass(frozen=True)
class OriginalOutput:
    """The original model's logits (rows, columns, vocabulary) at some ``columns`` of the rows; all where None."""

    logits: torch.Tensor
    columns: list[int] | None


class Anchor(Penalty):
    """β = ``kl``; ``prompts_per_step`` counts all ranks and accumulation steps together."""

    Options = AnchorConfig
    summary = "KL divergence from the original model"
    paper = "Li & Hoiem 2017"
    metric = "anchor_kl"

    def __init__(self, options: AnchorConfig, setup: PenaltySetup) -> None:
        super().__init__(options, setup)
        self._on_batch = options.data == "train"
        every = range(len(setup.preserve))
        # The first of one permutation, so a larger number of prompts includes those of a smaller one.
        self._chosen = sample(every, options.prompts or len(every), "anchor prompts", setup.seed)
        self._cache: OriginalCache | None = None

    @classmethod
    def needs(cls, options: AnchorConfig) -> Needs:
        cached = options.reference == "cached"
        if options.data == "train":
            return Needs(original_model=not cached, preparation=cached)
        answers = options.tokens == "answer"
        return Needs(preserve=True, original_model=not cached, preparation=cached, answers=answers)

    @property
    def weight(self) -> float:
        """The largest β of the run."""
        constant = self.options.schedule == "constant"
        return self.options.kl if constant else max(self.options.kl, self.options.final_kl)

    def weight_at(self, step: int) -> float:
        """β at ``step``: `kl` at the first, and unless it is constant `final_kl` at the last."""
        first, last = self.options.kl, self.options.final_kl
        share = step / max(1, self.setup.steps - 1)
        if self.options.schedule == "linear":
            return first + (last - first) * share
        if self.options.schedule == "cosine":
            return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
        return first

    def prepare(self, preparation: Preparation) -> dict[str, torch.Tensor]:
        """The original model's distributions on every prompt that may be used, or every training row that is."""
        numbers = self._chosen
        if self._on_batch:
            numbers = sorted({self._training.number(item) for item in range(len(self._training))})
        rows = {number: self._row(number) for number in numbers}
        places = {number: positions(row, self.options.tokens) for number, row in rows.items()}
        options, model = self.options, preparation.model
        with nullcontext() if preparation.method.starts_at_base else _original(model):
            return compute_cache(model, rows, places, options.top_k, options.temperature, self.setup.pad_id)

    # -- which rows ----------------------------------------------------------------------------------------------

    def step_numbers(self, step: int) -> list[int]:
        """The numbers of all rows that one optimiser step looks at, over all ranks and passes."""
        if self._on_batch:
            size = len(self._training) // self.setup.steps
            return [self._training.number(item) for item in range(step * size, (step + 1) * size)]
        count, size = self.options.prompts_per_step, len(self._chosen)
        numbers = []
        for position in range(step * count, (step + 1) * count):
            lap, index = divmod(position, size)
            numbers.append(self._chosen[self._order(lap)[index]])
        return numbers

    def pass_numbers(self, at: MicroStep) -> list[int]:
        """This pass's share of them: every ``parts``-th prompt; of the training rows those that are its batch."""
        numbers = self.step_numbers(at.step)
        if self._on_batch:
            size = len(numbers) // at.parts
            return numbers[at.part * size : (at.part + 1) * size]
        return numbers[at.part :: at.parts]

    def step_prompts(self, step: int) -> list[Row]:
        """The rows of one optimiser step."""
        return [self._row(number) for number in self.step_numbers(step)]

    def _row(self, number: int) -> Row:
        return self._training.row(number) if self._on_batch else self.setup.preserve[number]

    @property
    def _training(self) -> "ScheduledRows":
        assert self.setup.training is not None
        return self.setup.training

    # -- the term ------------------------------------------------------------------------------------------------

    def rows(self, at: MicroStep) -> Batch | None:
        """This pass's prompts; None where none falls to it, and where the training rows are looked at."""
        if self._on_batch:
            return None
        mine = [self._row(number) for number in self.pass_numbers(at)]
        return collate(mine, self.setup.pad_id) if mine else None

    def before(self, model: nn.Module, at: MicroStep, rows: Batch | None, batch: Batch) -> OriginalOutput | None:
        """The original model's logits on the rows of this pass; None where they are cached.

        A pass without prompts runs it on a row of one token: under ZeRO-3 all ranks must make the same passes.
        """
        if self.options.reference == "cached":
            return None
        mine = [self._row(number) for number in self.pass_numbers(at)]
        if not mine:
            nothing = Row(self.setup.preserve[0].input_ids[:1], [])
            return original_logits(model, collate([nothing], self.setup.pad_id))
        columns = None
        if self.options.tokens != "all":
            columns = sorted({p for row in mine for p in positions(row, self.options.tokens)})
        return original_logits(model, collate(mine, self.setup.pad_id) if rows is None else rows, columns)

    def penalty(
        self,
        model: nn.Module,
        at: MicroStep,
        rows: Batch | None,
        logits: torch.Tensor | None,
        prepared: OriginalOutput | None,
    ) -> torch.Tensor | None:
        """Sum of this pass's token divergences over the number of looked-at tokens of the whole step."""
        if self._on_batch:
            return None
        if rows is None or logits is None:
            return torch.zeros((), device=next(model.parameters()).device)
        return self._share(at, logits, prepared)

    def batch_penalty(
        self, model: nn.Module, at: MicroStep, batch: Batch, logits: torch.Tensor, prepared: OriginalOutput | None
    ) -> torch.Tensor | None:
        """As `penalty`, over the rows of the training batch."""
        return self._share(at, logits, prepared) if self._on_batch else None

    def _share(self, at: MicroStep, logits: torch.Tensor, original: OriginalOutput | None) -> torch.Tensor:
        """Σ T²·KL at the looked-at positions of this pass's rows, over their number in the whole step."""
        looked_at = {number: positions(self._row(number), self.options.tokens) for number in self.step_numbers(at.step)}
        tokens = sum(len(looked_at[number]) for number in self.step_numbers(at.step))
        numbers = self.pass_numbers(at)
        mine = [looked_at[number] for number in numbers]
        temperature = self.options.temperature
        reference: Reference
        if original is None:
            self._cache = self._cache or OriginalCache(self.setup.prepared)
            reference = self._cache.take(numbers, [len(own) for own in mine], logits.device)
        else:
            theirs = mine
            if original.columns is not None:
                column = {position: place for place, position in enumerate(original.columns)}
                theirs = [[column[position] for position in own] for own in mine]
            length, vocabulary = original.logits.shape[1:]
            places = _places(theirs, length, logits.device)
            reference = Logits(original.logits.reshape(-1, vocabulary), places, temperature)
        value = summed_divergence(logits, _places(mine, logits.shape[1], logits.device), reference, temperature)
        return value / tokens if temperature == 1.0 else value * (temperature**2 / tokens)

    def _order(self, lap: int) -> list[int]:
        if getattr(self, "_lap", None) != lap:
            generator = torch.Generator().manual_seed(seed_for("anchor", self.setup.seed, lap))
            self._permutation = torch.randperm(len(self._chosen), generator=generator).tolist()
            self._lap = lap
        return self._permutation


def positions(row: Row, tokens: str) -> Sequence[int]:
    """The positions whose next-token distributions the anchor looks at.

    ``all``: every position. ``answer``: those that predict a labelled token, so from the last token of the prompt to
    the last but one of the answer. ``last``: the last of the prompt, which is the last of the row where there is no
    answer (or where, without a prompt, everything is labelled).
    """
    length = len(row.input_ids)
    if tokens == "all":
        return range(length)
    labelled = [place for place, label in enumerate(row.labels) if label != IGNORED]
    if tokens == "answer":
        return [place - 1 for place in labelled if place > 0]
    return [labelled[0] - 1 if labelled and labelled[0] > 0 else length - 1]


@torch.no_grad()
def original_logits(model: nn.Module, rows: Batch, columns: list[int] | None = None) -> OriginalOutput:
    """Logits of the original model, dropout off, at ``columns`` of the rows if the model can leave out the others."""
    peft_model = model.module if hasattr(model, "module") else model
    training = model.training
    device = next(peft_model.parameters()).device
    chosen: dict[str, Any] = {}
    if columns is not None and _keeps_some_logits(peft_model):
        chosen["logits_to_keep"] = torch.tensor(columns, device=device)
    model.eval()
    try:
        with _original(peft_model):
            inputs = {name: tensor.to(device) for name, tensor in rows.items()}
            logits = model(**arguments(model, inputs), **chosen).logits
    finally:
        model.train(training)
    return OriginalOutput(logits, columns if chosen else None)


def _original(model: nn.Module) -> AbstractContextManager[None]:
    from harness.adapters.lora import original_model  # PEFT takes seconds that checking a configuration should not pay

    return original_model(model)


def _keeps_some_logits(model: nn.Module) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _places(mine: Sequence[Sequence[int]], length: int, device: torch.device) -> torch.Tensor:
    """Rows of a (rows · length, …) view at the positions ``mine`` of each row."""
    places = [line * length + position for line, own in enumerate(mine) for position in own]
    return torch.tensor(places, dtype=torch.long, device=device)
