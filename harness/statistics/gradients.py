"""Gradient statistics of target layers: output-gradient covariances (K-FAC) and weight gradients.

FARSS (§3.2, Eq. 2) takes F ≈ Σ_h ⊗ Σ_δ with Σ_h = E[h hᵀ] and Σ_δ = E[δ δᵀ], where h is a layer's input and
δ = ∂L/∂y the gradient at its output. Here L is the negative log-likelihood of a row's response: the *sum* of the
next-token losses over response tokens, so that rows in the same batch do not change one another's gradients and the
batch size changes nothing. Both expectations are over all real tokens: a prompt token carries no loss of its own, but
an activation and, through attention, a gradient. Dropout is off. (The reference code counts padding, keeps dropout on
and takes 1,024 tokens per batch.)

LoRA-GA (Wang et al., 2024) takes the gradient with respect to the weight, here the mean over response tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from harness.data.collation import Batch
from harness.data.sampling import seed_for
from harness.data.tokenisation import IGNORED
from harness.errors import UserError
from harness.models.freezing import gradients_of_activations
from harness.statistics.statistic import Kind, Statistic


def collect_gradient_statistics(
    model: nn.Module,
    modules: dict[str, nn.Linear],
    groups: dict[str, str],
    batches: Iterable[Batch],
    kinds: Sequence[Kind],
    fisher: Literal["empirical", "mc"] = "empirical",
    seed: int = 0,
) -> dict[Kind, dict[str, Statistic]]:
    """Collect ``kinds`` in one forward and backward pass per batch, summed over all ranks.

    Args:
        modules: target layers by name.
        groups: layer → first layer of its group, as `input_groups` returns it.
        batches: padded batches with ``input_ids``, ``attention_mask`` and ``labels`` of shape (rows, length).
        fisher: ``empirical`` takes the labels of the data; ``mc`` draws each response token from the model's own
            prediction, given the data before it (Monte-Carlo estimate of the true Fisher; Kunstner et al., 2019).
        seed: of the draws, together with a row's text: the same on any rank and in any batch.

    Returns:
        kind → layer (for input covariances: group) → statistic. Every rank gets the same result.

    Raises:
        UserError: an activation or gradient is NaN or inf (the message names layer and batch), a layer does not read
            one row per token, no gradient can reach it, or no row has a response token.

    Warning:
        All matrices are resident on the model's device at once, in fp32: for a 7B Llama 42 GB of output-gradient
        covariances beside 22 GB of input covariances.
    """
    collector = _Collector(modules, groups, kinds, next(model.parameters()).device)
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: collector.forward(name, inputs[0], output))
        for name, module in modules.items()
    ]
    training = model.training
    model.eval()
    try:
        with gradients_of_activations(model), torch.enable_grad():
            for batch in batches:
                _one_pass(model, batch, collector, fisher, seed)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return collector.result()


def _one_pass(
    model: nn.Module, batch: Batch, collector: "_Collector", fisher: Literal["empirical", "mc"], seed: int
) -> None:
    device = collector.device
    mask = batch["attention_mask"].to(device).bool()
    labels = batch["labels"][:, 1:].to(device)
    has_loss = labels != IGNORED
    collector.begin(mask, has_loss)
    logits_BLV = model(input_ids=batch["input_ids"].to(device), attention_mask=mask.long(), use_cache=False).logits
    logits_TV = logits_BLV[:, :-1][has_loss].float()  # of the tokens with a loss alone: the rest would be most of them
    targets = labels[has_loss] if fisher == "empirical" else _drawn(logits_TV.detach(), has_loss, batch, seed)
    loss = nn.functional.cross_entropy(logits_TV, targets, reduction="sum")
    collector.check(loss, "the loss")
    loss.backward()


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


class _Collector:
    """Sums of one rank; `begin` at each batch, `forward` from the hooks, `result` at the end."""

    def __init__(
        self, modules: dict[str, nn.Linear], groups: dict[str, str], kinds: Sequence[Kind], device: torch.device
    ) -> None:
        self.device = device
        self._groups = groups
        shapes: dict[Kind, dict[str, tuple[int, int]]] = {
            "input_covariance": {g: (modules[g].in_features,) * 2 for g in sorted(set(groups.values()))},
            "output_gradient_covariance": {n: (m.out_features,) * 2 for n, m in modules.items()},
            "weight_gradient": {n: (m.out_features, m.in_features) for n, m in modules.items()},
        }
        self._sums = {
            kind: {name: torch.zeros(shape, device=device) for name, shape in shapes[kind].items()} for kind in kinds
        }
        self._tokens = torch.zeros(2, dtype=torch.int64, device=device)  # real tokens, tokens with a loss
        self._mask = torch.empty(0)
        self._batch = -1

    def begin(self, mask: torch.Tensor, has_loss: torch.Tensor) -> None:
        self._batch += 1
        self._mask = mask.flatten()
        self._tokens += torch.stack([mask.sum(), has_loss.sum()])

    def forward(self, name: str, inputs_BLD: torch.Tensor, output: torch.Tensor) -> None:
        if inputs_BLD.reshape(-1, inputs_BLD.shape[-1]).shape[0] != self._mask.numel():
            raise UserError(
                f"model.target_modules: {name} does not read one row per token, so it has no covariance over tokens; "
                "list the layers to adapt without it"
            )
        if not output.requires_grad:
            raise UserError(
                f"model.target_modules: {name} does not depend on the token embeddings, so no gradient of the loss can "
                "be followed to it; list the layers to adapt without it"
            )
        if self._wants("input_covariance") and self._groups[name] == name:
            real_TD = self._real(inputs_BLD.detach())
            self._add("input_covariance", name, real_TD, real_TD)
        # Only what the backward pass reads is kept alive until then.
        inputs_TD = self._real(inputs_BLD.detach()) if self._wants("weight_gradient") else None
        output.register_hook(lambda gradient: self._backward(name, inputs_TD, gradient))

    def _backward(self, name: str, inputs_TD: torch.Tensor | None, gradient: torch.Tensor) -> None:
        gradient_TD = self._real(gradient)
        if self._wants("output_gradient_covariance"):
            self._add("output_gradient_covariance", name, gradient_TD, gradient_TD)
        if inputs_TD is not None:
            self._add("weight_gradient", name, gradient_TD, inputs_TD)

    def _wants(self, kind: Kind) -> bool:
        return kind in self._sums

    def _real(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of real tokens, (tokens, features)."""
        return values.reshape(-1, values.shape[-1])[self._mask]

    def _add(self, kind: Kind, name: str, left_TD: torch.Tensor, right_TD: torch.Tensor) -> None:
        product = left_TD.float().T @ right_TD.float()
        # A NaN or inf in any entry of column j reaches the diagonal entry j of a covariance: d checks tell about T·d.
        self.check(product if kind == "weight_gradient" else product.diagonal(), f"{_PLACES[kind]} of layer {name}")
        self._sums[kind][name] += product

    def check(self, values: torch.Tensor, what: str) -> None:
        """Raise `UserError` where ``values`` are not finite."""
        if not torch.isfinite(values).all():
            raise UserError(
                f"statistics: NaN or inf in {what}, batch {self._batch}; "
                "try model.dtype: float32, or look at the rows of that batch"
            )

    def result(self) -> dict[Kind, dict[str, Statistic]]:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._tokens)
            for sums in self._sums.values():
                for matrix in sums.values():
                    torch.distributed.all_reduce(matrix)
        tokens, with_loss = self._tokens.tolist()
        if with_loss == 0:
            raise UserError("statistics: no sampled row has a response token; check the response column and max_length")
        counts = {"input_covariance": tokens, "output_gradient_covariance": tokens, "weight_gradient": with_loss}
        return {
            kind: {name: Statistic((matrix / counts[kind]).cpu(), counts[kind]) for name, matrix in sums.items()}
            for kind, sums in self._sums.items()
        }


_PLACES: dict[Kind, str] = {
    "input_covariance": "the input",
    "output_gradient_covariance": "the output gradient",
    "weight_gradient": "the weight gradient",
}
