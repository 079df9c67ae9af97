"""Curvature of the data's log-likelihood in an adapter's own weights: empirical Fisher blocks, diagonal or Kronecker.

The precision of LALoRA's Laplace approximation (Sliwa et al., 2025, Eq. 5 and Appendix C). A sequence's log-likelihood
is log p(y|x), the *sum* of the log-probabilities of its labelled tokens. With x_t the input of A at token t, a_t the
input of B (a = A·x in a LoRA), g_t = ∂ log p/∂(A's output) and h_t = ∂ log p/∂(B's output), the gradients of one
sequence are ∂ log p/∂A = Σ_t g_t x_tᵀ and ∂ log p/∂B = Σ_t h_t a_tᵀ.

Diagonal: the mean over sequences of their squares, entry by entry.

K-FAC replaces the mean over sequences of vec(∂A) vec(∂A)ᵀ by A₀₀ ⊗ G₁₁: what different tokens of a sequence
contribute is taken as uncorrelated, and a token's input as independent of its gradient. So that the product stands for
the same matrix, A-factors are means over tokens and G-factors sums over tokens, averaged over sequences:

    A₀₀ = E_t[x xᵀ] (in, in)    G₁₁ = E_s Σ_t g gᵀ (r, r)      of A
    A₁₁ = E_t[a aᵀ] (r, r)      G₂₂ = E_s Σ_t h hᵀ (out, out)  of B
    A₀₁ = E_t[x aᵀ] (in, r)     G₁₂ = E_s Σ_t g hᵀ (r, out)    between A and B

Padding is masked, rows without a label are not sequences, and the numbers are the same for any batch size and number
of ranks. Where B is zero g is zero, and with it every block that A has a part in; those are not collected.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from harness.adapters.lora import TRAINED, lora_layers, saved_name
from harness.data.collation import LABELS, Batch, size_of
from harness.errors import UserError
from harness.models.calling import arguments
from harness.models.freezing import gradients_of_activations
from harness.models.targets import reads_images
from harness.tasks.objectives import NEXT_TOKEN, Objective

FACTORS = ("A00", "G11", "A11", "G22", "A01", "G12")


@dataclass(frozen=True)
class LinearPair:
    """A and B of one adapted layer, both `nn.Linear`; ``layer`` is the module that holds them."""

    layer: nn.Module
    A: nn.Linear
    B: nn.Linear

    @property
    def a_has_gradient(self) -> bool:
        """Whether A is trained and its gradient is not identically zero, as it is where B is."""
        return self.A.weight.requires_grad and bool(self.B.weight.any())


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that is trained, by the name under which checkpoints hold it."""
    return {saved_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad}


def linear_pairs(model: nn.Module) -> dict[str, LinearPair] | None:
    """A and B of every adapted layer by its name, where they are linear layers and all that is trained; else None."""
    pairs = {}
    for name, layer in lora_layers(model).items():
        A, B = (getattr(layer, side, {}) for side in ("lora_A", "lora_B"))
        if TRAINED not in A or not isinstance(A[TRAINED], nn.Linear) or not isinstance(B[TRAINED], nn.Linear):
            return None
        pairs[name] = LinearPair(layer, A[TRAINED], B[TRAINED])
    weights = {id(weight) for pair in pairs.values() for weight in (pair.A.weight, pair.B.weight)}
    others = [name for name, weight in trained_weights(model).items() if id(weight) not in weights]
    return None if others or not pairs else pairs


def goes_by_rows(model: nn.Module) -> bool:
    """Whether the diagonal takes a backward pass for every sequence.

    It does unless all that is trained are A and B of linear layers that read tokens and nothing else. DeBERTa's
    projections read its table of relative positions too, which counts in a weight's gradient, and a projector's rows
    are those of all images of a batch.
    """
    pairs = linear_pairs(model)
    return pairs is None or getattr(model.config, "share_att_key", False) or any(map(reads_images, pairs))


def diagonal_fisher(
    model: nn.Module, batches: Iterable[Batch], objective: Objective = NEXT_TOKEN
) -> dict[str, torch.Tensor]:
    """The mean over sequences of the squared gradient of every trained weight, over all ranks' ``batches``.

    One backward pass serves a batch; where `goes_by_rows` says so, a sequence.

    Args:
        batches: padded batches of this rank, as `collate` makes them; of one row each where a row has images and
            `goes_by_rows` says so.

    Returns:
        saved name → (shape of the weight), in fp32 at least. Weights whose gradient is zero because B is are left out.
        Every rank gets the same.

    Raises:
        UserError: a gradient is NaN or inf (the message names layer and batch), a layer does not read one row per
            token, or no row has a labelled token.
    """
    sums, sequences = (
        _diagonal_by_rows(model, batches, objective)
        if goes_by_rows(model)
        else _diagonal_of_pairs(model, linear_pairs(model) or {}, batches, objective)
    )
    counts = _reduced([*sums.values(), sequences])
    return {name: total / counts for name, total in sums.items()}


def kronecker_factors(
    model: nn.Module,
    pairs: Mapping[str, LinearPair],
    groups: Mapping[str, str],
    batches: Iterable[Batch],
    cross: bool,
    objective: Objective = NEXT_TOKEN,
) -> dict[str, dict[str, torch.Tensor]]:
    """The K-FAC factors of every layer's A and B, over all ranks' ``batches``.

    Args:
        groups: layer → the layer under whose name its group's A₀₀ is kept, as `input_groups` returns it.
        cross: whether the factors between A and B are wanted too (B-TRI-K-FAC).

    Returns:
        name of the factor (see `FACTORS`) → layer → matrix, in fp32 at least. A layer whose A has no gradient has
        G₂₂ and A₁₁ alone. Every rank gets the same.

    Raises:
        UserError: as `diagonal_fisher` does.

    Warning:
        All matrices are resident on the model's device at once: for a 7B Llama 42 GB of G₂₂ in fp32, and 22 GB of A₀₀
        beside them where B is not zero.
    """
    device = next(model.parameters()).device
    sums: dict[str, dict[str, torch.Tensor]] = {factor: {} for factor in FACTORS}
    counts = torch.zeros(2, dtype=torch.float64, device=device)  # sequences, real tokens

    def matrix(factor: str, name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
        sums[factor][name] = torch.zeros(rows, columns, dtype=dtype, device=device)

    for name, pair in pairs.items():
        (rank, width), out, dtype = pair.A.weight.shape, pair.B.weight.shape[0], _sum_dtype(pair.A.weight)
        matrix("A11", name, rank, rank, dtype)
        matrix("G22", name, out, out, dtype)
        if pair.a_has_gradient:
            matrix("G11", name, rank, rank, dtype)
            if groups[name] not in sums["A00"]:
                matrix("A00", groups[name], width, width, dtype)
            if cross:
                matrix("A01", name, width, rank, dtype)
                matrix("G12", name, rank, out, dtype)

    def add(name: str, tokens: "_Tokens", batch: int) -> None:
        pieces = {
            "A00": (tokens.x, tokens.x),
            "G11": (tokens.g, tokens.g),
            "A11": (tokens.a, tokens.a),
            "G22": (tokens.h, tokens.h),
            "A01": (tokens.x, tokens.a),
            "G12": (tokens.g, tokens.h),
        }
        for factor, (left_BLD, right_BLD) in pieces.items():
            if name in sums[factor]:  # under A00 the first layer of a group alone
                product = left_BLD.flatten(0, 1).T @ right_BLD.flatten(0, 1)
                _check(product, f"{factor} of layer {name}", batch)
                sums[factor][name] += product

    # The group's first layer need not be one whose A has a gradient; whoever it is, its input is the group's.
    for number, batch in enumerate(batches):
        counts[0] += _one_pass(model, pairs, batch, number, add, objective)
        counts[1] += batch["attention_mask"].sum()
    sequences = _reduced([*(m for named in sums.values() for m in named.values()), counts], at=0)
    tokens = counts[1]
    return {
        factor: {name: total / (tokens if factor.startswith("A") else sequences) for name, total in named.items()}
        for factor, named in sums.items()
    }


def _diagonal_of_pairs(
    model: nn.Module, pairs: Mapping[str, LinearPair], batches: Iterable[Batch], objective: Objective
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    names = {id(weight): name for name, weight in trained_weights(model).items()}
    sums = {}
    for pair in pairs.values():
        wanted = [pair.A.weight] if pair.a_has_gradient else []
        for weight in [*wanted, *([pair.B.weight] if pair.B.weight.requires_grad else [])]:
            sums[names[id(weight)]] = torch.zeros(weight.shape, dtype=_sum_dtype(weight), device=weight.device)
    targets = {name: (names.get(id(pair.A.weight)), names.get(id(pair.B.weight))) for name, pair in pairs.items()}

    def add(name: str, tokens: "_Tokens", batch: int) -> None:
        sides = zip(targets[name], ((tokens.g, tokens.x), (tokens.h, tokens.a)), strict=True)
        for target, (gradient_BLO, input_BLI) in sides:
            if target in sums:
                per_row_BOI = gradient_BLO.transpose(1, 2) @ input_BLI
                _check(per_row_BOI, f"the gradient of {target}", batch)
                sums[target] += per_row_BOI.square_().sum(0)

    sequences = torch.zeros(1, dtype=torch.float64, device=next(model.parameters()).device)
    for number, batch in enumerate(batches):
        sequences += _one_pass(model, pairs, batch, number, add, objective)
    return sums, sequences


def _diagonal_by_rows(
    model: nn.Module, batches: Iterable[Batch], objective: Objective
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weights = trained_weights(model)
    sums = {name: torch.zeros(w.shape, dtype=_sum_dtype(w), device=w.device) for name, w in weights.items()}
    sequences = torch.zeros(1, dtype=torch.float64, device=next(model.parameters()).device)
    for number, batch in enumerate(batches):
        rows = size_of(batch)
        tokens = batch.get("input_ids")
        if rows > 1 and tokens is not None and any(batch[n].shape != tokens.shape for n in batch.keys() - {LABELS}):
            raise ValueError("rows with images are not told apart in a batch; give batches of one row")
        for row in range(rows):
            one = batch if rows == 1 else {key: value[row : row + 1] for key, value in batch.items()}
            if not objective.counted(one[LABELS]).any():
                continue
            loss = _negative_log_likelihood(model, one, objective)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    _check(gradient, f"the gradient of {name}", number)
                    sums[name] += gradient.to(sums[name].dtype).square()
            sequences += 1
    return sums, sequences


@dataclass(frozen=True)
class _Tokens:
    """What one layer saw in one pass, (rows, tokens, width) each, zero at padding: x, g of A and a, h of B."""

    x: torch.Tensor
    g: torch.Tensor
    a: torch.Tensor
    h: torch.Tensor


def _one_pass(
    model: nn.Module,
    pairs: Mapping[str, LinearPair],
    batch: Batch,
    number: int,
    add: Callable[[str, _Tokens, int], None],
    objective: Objective,
) -> int:
    """One forward and backward pass; ``add`` gets every layer's tokens. Returns the number of sequences."""
    device = next(model.parameters()).device
    mask_BL = batch["attention_mask"].to(device).bool()
    seen: dict[str, dict[str, torch.Tensor]] = {name: {} for name in pairs}
    called: set[tuple[str, str]] = set()

    def real(values: torch.Tensor, name: str) -> torch.Tensor:
        if values.numel() != mask_BL.numel() * values.shape[-1]:
            raise UserError(
                f"model.target_modules: {name} does not read one row per token, so its adapter has no curvature over "
                "tokens; list the layers to adapt without it"
            )
        values_BLD = values.detach().reshape(*mask_BL.shape, values.shape[-1])
        # Not a product with the mask: 0 · NaN is NaN.
        return values_BLD.to(_sum_dtype(values_BLD)).masked_fill(~mask_BL.unsqueeze(-1), 0.0)

    def at_output(name: str, side: str, given: torch.Tensor, output: torch.Tensor) -> None:
        if (name, side) in called and len(given) == 1:  # a table for all sequences: relative positions are no tokens
            return
        called.add((name, side))
        seen[name]["x" if side == "A" else "a"] = given.detach()
        output.register_hook(lambda gradient: at_gradient(name, side, gradient))

    def at_gradient(name: str, side: str, gradient: torch.Tensor) -> None:
        own = seen[name]
        own["g" if side == "A" else "h"] = gradient
        if len(own) == 4:  # B's gradient comes first, A's last
            add(name, _Tokens(**{key: real(values, name) for key, values in own.items()}), number)
            own.clear()

    handles = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name, side=side: at_output(name, side, inputs[0], output)
        )
        for name, pair in pairs.items()
        for side, module in (("A", pair.A), ("B", pair.B))
    ]
    try:
        with gradients_of_activations(model):
            loss = _negative_log_likelihood(model, batch, objective)
            _check(loss, "the loss", number)
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return int(objective.counted(batch[LABELS]).any(1).sum())


@torch.enable_grad()
def _negative_log_likelihood(model: nn.Module, batch: Batch, objective: Objective) -> torch.Tensor:
    """−log p(y|x), summed over the rows, dropout off."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = objective.logits(model(**arguments(model, inputs)), inputs)
    finally:
        model.train(training)
    counted = objective.counted(inputs[LABELS])
    return objective.between(objective.compared(logits, counted), objective.targets(inputs[LABELS], counted))


def _sum_dtype(values: torch.Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _check(values: torch.Tensor, what: str, batch: int) -> None:
    if not torch.isfinite(values).all():
        raise UserError(
            f"statistics: NaN or inf in {what}, batch {batch}; "
            "try model.dtype: float32, or look at the rows of that batch"
        )


def _reduced(sums: list[torch.Tensor], at: int = 0) -> torch.Tensor:
    """Add up over ranks, in place; entry ``at`` of the last one, the number of sequences."""
    if torch.distributed.is_initialized():
        for total in sums:
            torch.distributed.all_reduce(total)
    sequences = sums[-1][at]
    if not sequences:
        raise UserError("statistics: no sampled row has a labelled token; check the response column and max_length")
    return sequences
