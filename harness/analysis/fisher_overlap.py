"""fisher-overlap: do two data sets lean on the same weights, by groups of singular components (FCLoRA, Fig. 1a and 4)?

FCLoRA, Appendix E: the diagonal Fisher matrices F₁ and F₂ of two data sets are divided by their traces; with
d² = ½·tr(F̂₁ + F̂₂ − 2(F̂₁F̂₂)^½) the overlap is 1 − d². Both traces being 1, that is Σ √(F̂₁F̂₂): 1 where one is a multiple
of the other, 0 where no weight matters to both. (On the right of its Eq. 12 the paper forgets the square of the norm,
½‖F̂₁^½ − F̂₂^½‖²_F; the middle, which is Kirkpatrick et al.'s, is what is computed.)

F is empirical: the mean over rows of the squared gradient of one row's loss, the *sum* of the next-token losses over
its labelled tokens. The singular components of every target layer, sorted by singular value, make equal groups. There
are two readings:

- ``reconstruction``, the paper's words: every target weight is replaced by its partial reconstruction U_g Σ_g V_gᵀ, and
  F is over the weights of *that* model;
- ``model``: the model stays whole, and the gradient ∂L/∂W is taken in the coordinates of the group, U_gᵀ (∂L/∂W) V_g.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from harness.analysis.figures import fisher_overlap_figure
from harness.analysis.inputs import Base, DataSet, choose_layers, configured, given, load_base
from harness.config import RunConfig
from harness.console import progress
from harness.data.collation import collate
from harness.data.tokenisation import IGNORED, Row
from harness.decomposition.plain_svd import plain_svd
from harness.errors import UserError
from harness.files import write_bytes, write_json, write_text
from harness.models.calling import arguments
from harness.models.freezing import gradients_of_activations
from harness.models.targets import describe, place
from harness.preflight import check_inputs
from harness.stages.calibrate import BATCH_ROWS
from harness.tasks.registry import load_task

MOST_ENTRIES = 1 << 26  # of per-row gradients held at once: 256 MB in fp32
ALL = "all"
Reading = Literal["reconstruction", "model"]
# one layer's inputs (rows, length, in) and output gradients (rows, length, out) → squared per-row gradients, summed
Squares = Callable[[str, torch.Tensor, torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Overlaps:
    """Sums over the entries of one layer's F₁ and F₂: enough for the overlap of any set of layers."""

    first: float
    second: float
    geometric: float

    @staticmethod
    def of(first: torch.Tensor, second: torch.Tensor) -> "Overlaps":
        """Of two diagonal Fisher matrices in any shape."""
        F1, F2 = first.double(), second.double()
        return Overlaps(float(F1.sum()), float(F2.sum()), float((F1.sqrt() * F2.sqrt()).sum()))


def overlap(layers: Sequence[Overlaps]) -> float | None:
    """Σ √(F₁F₂) / √(tr F₁ · tr F₂) over all entries of ``layers``; None where a trace is zero."""
    first, second = sum(layer.first for layer in layers), sum(layer.second for layer in layers)
    product = (first**0.5) * (second**0.5)
    return sum(layer.geometric for layer in layers) / product if product else None


def fisher_overlap(
    config: RunConfig,
    out: Path,
    *,
    groups: int = 8,
    at: Reading = "reconstruction",
    layers: Sequence[str] | None = None,
    data: str | None = None,
    samples: int | None = None,
) -> list[Path]:
    """Write ``fisher-overlap.png``, ``.json`` and ``.md`` to ``out`` and return their paths.

    Args:
        groups: how many groups of singular components; sizes differ by at most one.
        at: the reading.
        layers: target layers, or parts of their names, whose Fisher matrices are compared; by default all. Under
            ``reconstruction`` every target layer is replaced all the same.
        data: ``FILE:COLUMN`` to compare with the train set; by default the configuration's preserve set.
        samples: rows drawn from each; by default each data set's own ``samples``.

    Raises:
        UserError: no such layer, more groups than singular components, unreadable data, or none with a loss.
    """
    check_inputs(config)
    sets = [configured(config, "preserve", samples) if data is None else given(data, samples)]
    sets.append(configured(config, "train", samples))
    task = load_task(config)
    rows = [_with_loss(texts.rows(task), texts) for texts in sets]
    base = load_base(task)
    names = choose_layers(list(base.modules), layers) if layers else list(base.modules)
    cuts = {
        layer.name: _cuts(layer.name, layer.out_features, layer.in_features, groups) for layer in describe(base.modules)
    }
    found, sigmas = (_at_reconstruction if at == "reconstruction" else _at_model)(base, rows, names, cuts)

    types = sorted({place(name)[1] for name in names})
    curves = {
        kind: [overlap([group[name] for name in names if kind in (ALL, place(name)[1])]) for group in found]
        for kind in (ALL, *types)
    }
    content: dict[str, Any] = {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "seed": config.train.seed,
        "at": at,
        "groups": groups,
        "data": [
            texts.record() | {"rows": len(own), "labelled_tokens": sum(map(_labelled, own))}
            for texts, own in zip(sets, rows, strict=True)
        ],
        "overlap": curves,
        "layers": {
            name: {
                "overlap": [overlap([group[name]]) for group in found],
                "components": [stop - start for start, stop in zip(cuts[name], cuts[name][1:], strict=False)],
                "largest_singular_value": [float(sigmas[name][start]) for start in cuts[name][:-1]],
                "traces": [[group[name].first, group[name].second] for group in found],
            }
            for name in names
        },
    }
    files = [out / f"fisher-overlap.{suffix}" for suffix in ("png", "json", "md")]
    labels = [texts.label.replace("\n", ": ") for texts in sets]
    write_bytes(files[0], fisher_overlap_figure(labels, at, curves))
    write_json(files[1], content)
    write_text(files[2], markdown(curves))
    return files


def markdown(curves: Mapping[str, Sequence[float | None]]) -> str:
    """A row per module type, a column per group, from the largest singular values to the smallest."""
    count = len(next(iter(curves.values())))
    lines = [
        "| layers, group of singular components | " + " | ".join(str(group + 1) for group in range(count)) + " |",
        "|---|" + "---:|" * count,
    ]
    for kind, values in curves.items():
        cells = ["no gradient" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# -- the two readings ------------------------------------------------------------------------------------------------

Found = tuple[list[dict[str, Overlaps]], dict[str, torch.Tensor]]


@torch.no_grad()
def _at_reconstruction(
    base: Base, rows: Sequence[Sequence[Row]], names: Sequence[str], cuts: Mapping[str, Sequence[int]]
) -> Found:
    """Group → layer → overlaps, at the partial reconstructions; and the singular values of every layer."""
    weights = {name: module.weight.detach().cpu().clone() for name, module in base.modules.items()}
    vectors, sides, sigmas = {}, {}, {}
    for name in progress(list(base.modules), "singular components"):
        found = plain_svd(base.modules[name].weight, list(cuts[name][1:-1]) or 0)
        vectors[name], sides[name], sigmas[name] = found.vectors.float().cpu(), found.side, found.sigma.cpu()
    groups = []
    try:
        for number in range(len(next(iter(cuts.values()))) - 1):
            for name, module in base.modules.items():
                part = slice(cuts[name][number], cuts[name][number + 1])
                own = vectors[name][:, part].to(base.device).double()
                W = weights[name].to(base.device).double()
                # U_g Σ_g V_gᵀ is a projection of W, whichever side's vectors are at hand.
                module.weight.copy_(own @ (own.T @ W) if sides[name] == "left" else (W @ own) @ own.T)
            title = f"group {number + 1}/{len(next(iter(cuts.values()))) - 1}"
            first, second = (_fisher(base, own, names, _weight_squares, title) for own in rows)
            groups.append({name: Overlaps.of(first[name][0], second[name][0]) for name in names})
    finally:
        for name, module in base.modules.items():
            module.weight.copy_(weights[name])
    return groups, sigmas


@torch.no_grad()
def _at_model(
    base: Base, rows: Sequence[Sequence[Row]], names: Sequence[str], cuts: Mapping[str, Sequence[int]]
) -> Found:
    """Group → layer → overlaps, of the whole model's gradients in the coordinates of each group."""
    pairs, sigmas = {}, {}
    for name in progress(names, "singular components"):
        weight = base.modules[name].weight
        # Both sides are needed, also of the smallest components: no projection gives those.
        U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        pairs[name], sigmas[name] = (U.float().cpu(), Vh.T.float().cpu()), sigma.cpu()

    def squares(name: str, inputs_BLD: torch.Tensor, gradients_BLD: torch.Tensor) -> list[torch.Tensor]:
        U, V = (vectors.to(base.device) for vectors in pairs[name])
        left, right = gradients_BLD @ U, inputs_BLD @ V
        parts = [slice(start, stop) for start, stop in zip(cuts[name], cuts[name][1:], strict=False)]
        return [_squared_products(left[..., part], right[..., part]) for part in parts]

    first, second = (_fisher(base, own, names, squares, "gradients") for own in rows)
    count = len(next(iter(cuts.values()))) - 1
    groups = [{name: Overlaps.of(first[name][g], second[name][g]) for name in names} for g in range(count)]
    return groups, sigmas


def _weight_squares(name: str, inputs_BLD: torch.Tensor, gradients_BLD: torch.Tensor) -> list[torch.Tensor]:
    return [_squared_products(gradients_BLD, inputs_BLD)]


# -- per-row gradients -----------------------------------------------------------------------------------------------


def _squared_products(left_BLD: torch.Tensor, right_BLD: torch.Tensor) -> torch.Tensor:
    """Σ_b (left_bᵀ right_b)², (left features, right features): the squared gradients of single rows, summed."""
    total = torch.zeros(left_BLD.shape[-1], right_BLD.shape[-1], device=left_BLD.device)
    at_once = max(1, MOST_ENTRIES // total.numel())
    for left, right in zip(left_BLD.split(at_once), right_BLD.split(at_once), strict=True):
        total += torch.bmm(left.mT, right).square_().sum(0)
    return total


def _fisher(
    base: Base, rows: Sequence[Row], names: Sequence[str], squares: Squares, title: str
) -> dict[str, list[torch.Tensor]]:
    """Mean over ``rows`` of what ``squares`` makes of each layer's inputs and output gradients, fp32, on the device."""
    sums: dict[str, list[torch.Tensor]] = {}
    with _followed(base, names) as batch_of:
        batches = [rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]
        for number, chosen in enumerate(progress(batches, title)):
            batch = {key: value.to(base.device) for key, value in collate(chosen, base.pad_id).items()}
            mask = batch["attention_mask"]

            def add(name: str, inputs: torch.Tensor, gradients: torch.Tensor, real: torch.Tensor = mask) -> None:
                # No real token attends to padding on its right, so its gradient is zero; what is not real must be.
                own = squares(name, *(values.float() * real[..., None] for values in (inputs, gradients)))
                if name in sums:
                    for total, part in zip(sums[name], own, strict=True):
                        total += part
                else:
                    sums[name] = own

            batch_of(mask, add)
            with torch.enable_grad():
                objective = base.task.objective
                logits = objective.logits(base.model(**arguments(base.model, batch)), batch)
                loss = objective.loss(logits, batch["labels"])
            if not torch.isfinite(loss):
                raise UserError(
                    f"model.dtype: NaN or inf in the loss, {title}, batch {number}; try model.dtype=float32"
                )
            loss.backward()
    return {name: [total / len(rows) for total in sums[name]] for name in names}


@contextmanager
def _followed(base: Base, names: Sequence[str]) -> Iterator[Callable[..., None]]:
    """Inside the block each backward pass tells inputs and output gradients of the layers to the function set last."""
    mask = torch.empty(0)
    tell: Callable[[str, torch.Tensor, torch.Tensor], None] = lambda *_: None  # noqa: E731
    seen: set[str] = set()

    def batch_of(new_mask: torch.Tensor, add: Callable[[str, torch.Tensor, torch.Tensor], None]) -> None:
        nonlocal mask, tell
        mask, tell = new_mask, add
        seen.clear()

    def forward(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        if inputs.shape[:-1] != mask.shape or name in seen or not output.requires_grad:
            raise UserError(
                f"model.target_modules: {name} does not read each token of a row once, so its gradients are not known "
                "by rows; list the layers without it"
            )
        seen.add(name)
        inputs = inputs.detach()
        output.register_hook(lambda gradient: tell(name, inputs, gradient))

    handles = [
        base.modules[name].register_forward_hook(lambda _, i, output, name=name: forward(name, i[0], output))
        for name in names
    ]
    try:
        with gradients_of_activations(base.model):
            yield batch_of
    finally:
        for handle in handles:
            handle.remove()


# -- rows and groups -------------------------------------------------------------------------------------------------


def _labelled(row: Row) -> int:
    """Tokens with a loss: the first is predicted by nothing."""
    return sum(label != IGNORED for label in row.labels[1:])


def _with_loss(rows: Sequence[Row], texts: DataSet) -> list[Row]:
    useful = [row for row in rows if _labelled(row)]
    if not useful:
        raise UserError(f"{texts.key}: no sampled row has a token with a loss within data.max_length; raise it")
    return useful


def _cuts(name: str, out_features: int, in_features: int, groups: int) -> list[int]:
    """Where the groups of a layer begin, and the end of the last."""
    components = min(out_features, in_features)
    if groups > components:
        raise UserError(
            f"--groups: {groups} given; layer {name} is {out_features}×{in_features}, so at most {components}"
        )
    return [round(group * components / groups) for group in range(groups + 1)]
