"""Sums over real tokens of what passes through layers: one implementation for whole models and for single blocks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from harness.data.collation import LABELS, Batch, model_inputs
from harness.errors import UserError
from harness.models.targets import reads_images
from harness.statistics.products import UpperTriangle, add_product
from harness.statistics.statistic import Kind
from harness.tasks.objectives import NEXT_TOKEN, Objective

Sums = dict[str, dict[str, torch.Tensor | UpperTriangle]]  # kind → layer (of inputs: first of its group) → sum
Quantity = Kind | Literal["mean_absolute_input"]
OF_INPUTS: tuple[Quantity, ...] = ("input_covariance", "mean_absolute_input")
SYMMETRIC: tuple[Quantity, ...] = ("input_covariance", "output_gradient_covariance")
_PLACES: dict[Quantity, str] = {
    "input_covariance": "the input",
    "mean_absolute_input": "the input",
    "output_gradient_covariance": "the output gradient",
    "weight_gradient": "the weight gradient",
}


class Tokens:
    """A padded batch on ``device``: which of its places are real tokens, and what of it carries a loss.

    ``number``: the batch's, in messages. ``places``: how many there are, with padding; None where the batch has no
    tokens, of images: every row that a layer reads is then real (patches, class token), as many as it happens to be.
    ``real``: how many are real. ``counted``: which items of ``objective`` have a label; ``with_loss``: how many.
    """

    def __init__(self, number: int, batch: Batch, device: torch.device, objective: Objective = NEXT_TOKEN) -> None:
        self.number, self.batch, self.device, self.objective = number, batch, device, objective
        mask_BL = batch["attention_mask"].bool() if "attention_mask" in batch else None
        self.places, self.real = (None, None) if mask_BL is None else (mask_BL.numel(), int(mask_BL.sum()))
        self.counted = objective.counted(batch[LABELS]) if LABELS in batch else torch.zeros(0, dtype=torch.bool)
        self.with_loss = int(self.counted.sum())
        # Found here, on the CPU: on an accelerator every selection by a mask would wait for it.
        self._kept: torch.Tensor | None = None
        if mask_BL is not None and self.real != self.places:
            self._kept = mask_BL.flatten().nonzero().flatten().to(device)

    def inputs(self) -> Batch:
        """What the model reads, on the device."""
        return {name: tensor.to(self.device) for name, tensor in model_inputs(self.batch).items()}

    def of(self, values: torch.Tensor, every: bool = False) -> torch.Tensor:
        """The rows of real tokens, (tokens, features); with ``every`` all rows, where none is padding."""
        flat_ND = values.reshape(-1, values.shape[-1])
        return flat_ND if every or self._kept is None else flat_ND.index_select(0, self._kept)


@dataclass
class Collector:
    """Sums of one rank over ``modules``, fp32, on the device; upper triangles alone of what is symmetric.

    `attached`, then for every batch `begin`, its pass, `check`.

    Of a layer that a model also applies to a table of its own (DeBERTa's query and key projections, to the embeddings
    of relative positions) the call that reads the tokens counts, and no other: it is the first. Layers that read the
    features of images (`harness.models.targets.reads_images`) count all of their rows, none of which is padding.

    Args:
        modules: linear layers by name.
        groups: layer → the layer under whose name their common input's sum is kept.
        kinds: what to sum.
    """

    modules: Mapping[str, nn.Linear]
    groups: Mapping[str, str]
    kinds: Sequence[Quantity]
    device: torch.device

    def __post_init__(self) -> None:
        first = sorted({self.groups[name] for name in self.modules}) if set(self.kinds) & set(OF_INPUTS) else []
        shapes: dict[Quantity, dict[str, tuple[int, ...]]] = {
            "input_covariance": {g: (self.modules[g].in_features,) * 2 for g in first},
            "mean_absolute_input": {g: (self.modules[g].in_features,) for g in first},
            "output_gradient_covariance": {n: (m.out_features,) * 2 for n, m in self.modules.items()},
            "weight_gradient": {n: (m.out_features, m.in_features) for n, m in self.modules.items()},
        }
        self.sums: Sums = {
            kind: {
                name: UpperTriangle(shape[0], self.device)
                if kind in SYMMETRIC
                else torch.zeros(shape, device=self.device)
                for name, shape in shapes[kind].items()
            }
            for kind in self.kinds
        }
        self.real = dict.fromkeys(self.modules, 0)  # rows of each layer, of inputs: of its group's first one
        self.with_loss = 0
        self._of_inputs = [kind for kind in self.kinds if kind in OF_INPUTS]
        self._of_gradients = [kind for kind in self.kinds if kind not in OF_INPUTS]
        self._checks: list[tuple[str, torch.Tensor]] = []
        self._called: set[str] = set()  # layers, since `begin`
        self._tokens: Tokens | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block layers report what passes through them."""
        handles = [
            module.register_forward_hook(lambda _, inputs, output, name=name: self._forward(name, inputs[0], output))
            for name, module in self.modules.items()
            if self._of_gradients or self.groups[name] == name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, tokens: Tokens) -> None:
        """What follows is of this batch."""
        self._tokens = tokens
        self._called.clear()
        self.with_loss += tokens.with_loss

    def check(self) -> None:
        """Raise `UserError` where anything since `begin` was NaN or inf: the first such place, and the batch."""
        if not self._checks:
            return
        finite = torch.stack([value for _, value in self._checks]).isfinite().tolist()
        for (what, _), good in zip(self._checks, finite, strict=True):
            if not good:
                raise not_finite(what, self._tokens.number)
        self._checks.clear()

    def pause(self) -> None:
        """What follows is of no batch."""
        self._tokens = None

    def follow(self, tokens: Tokens) -> None:
        """What follows is the backward pass of this batch, which had begun before."""
        self._tokens = tokens

    def _forward(self, name: str, inputs_BLD: torch.Tensor, output: torch.Tensor) -> None:
        if self._tokens is None:
            return
        if name in self._called:
            if len(inputs_BLD) == 1:  # a table for all sequences
                return
            raise UserError(
                f"model.target_modules: {name} is applied twice in one pass, so it has no statistics over tokens; list "
                "the layers to adapt without it"
            )
        self._called.add(name)
        tokens, rows = self._tokens, inputs_BLD.numel() // inputs_BLD.shape[-1]
        every = tokens.places is None or reads_images(name)
        if not every and rows != tokens.places:
            raise UserError(
                f"model.target_modules: {name} reads {rows} rows for {tokens.places} tokens, so it has no statistics "
                "over tokens; list the layers to adapt without it"
            )
        self.real[name] += rows if every else tokens.real
        if self._of_gradients and not output.requires_grad:
            raise UserError(
                f"model.target_modules: {name} does not depend on the token embeddings, so no gradient of the loss can "
                "be followed to it; list the layers to adapt without it"
            )
        if self._of_inputs and self.groups[name] == name:
            real_TD = tokens.of(inputs_BLD.detach(), every)
            for kind in self._of_inputs:
                self._add(kind, name, real_TD, real_TD)
        if self._of_gradients:
            # Only what the backward pass reads is kept alive until then.
            inputs_TD = tokens.of(inputs_BLD.detach(), every) if "weight_gradient" in self.kinds else None
            output.register_hook(lambda gradient: self._backward(name, inputs_TD, gradient))

    def _backward(self, name: str, inputs_TD: torch.Tensor | None, gradient: torch.Tensor) -> None:
        if self._tokens is None:
            return
        gradient_TD = self._tokens.of(gradient, reads_images(name))
        for kind in self._of_gradients:
            self._add(kind, name, gradient_TD, gradient_TD if kind in SYMMETRIC or inputs_TD is None else inputs_TD)

    @torch.no_grad()
    def _add(self, kind: Quantity, name: str, left_TD: torch.Tensor, right_TD: torch.Tensor) -> None:
        total = self.sums[kind][name]
        if isinstance(total, UpperTriangle):
            total.add(left_TD)
            # A NaN or inf in any entry of channel j reaches entry j of the diagonal: d numbers tell about T·d.
            check = total.trace()
        else:
            if kind == "weight_gradient":
                add_product(total, left_TD, right_TD)
            else:
                total += left_TD.float().abs().sum(0)
            check = total.sum()
        self._checks.append((f"{_PLACES[kind]} of layer {name}", check))


def not_finite(what: str, batch: int) -> UserError:
    """The error about a NaN or inf in ``what``."""
    return UserError(
        f"statistics: NaN or inf in {what}, batch {batch}; try model.dtype: float32, or look at the rows of that batch"
    )
