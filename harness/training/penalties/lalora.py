"""LALoRA (Sliwa et al., 2025): a Laplace penalty that holds an adapter's weights where source data say it matters.

The loss gains λ · Σ vec(θ − μ)ᵀ P vec(θ − μ) over the adapter's weights θ (Eq. 4, without the ½ of §2), where μ is the
adapter at step 0 and P the precision of a Laplace approximation: the sum over source sets of the Fisher information of
their log-likelihood (`harness.statistics.adapter_curvature`), diagonal (Eq. 5), by Kronecker factors for A and for B
(B-K-FAC, Eq. 11), or with the blocks between them (B-TRI-K-FAC, Eq. 12).

P is computed once, before training. In training the layers are dealt out to the ranks: each holds the precision of its
own alone and computes their term once a step, in its last forward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, create_model
from torch import nn

from harness.adapters.partitioned import gathered
from harness.config import NonNegativeFloat, SourceConfig, Strict
from harness.data.collation import Batch, collate
from harness.data.sampling import sample
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.models.calling import arguments
from harness.statistics.precision import CrossForm, DiagonalForm, Evaluated, Form, KroneckerForm
from harness.training.distributed import rank, share, world_size
from harness.training.penalties.base import MicroStep, Needs, Penalty, Preparation

if TYPE_CHECKING:
    from harness.statistics.adapter_curvature import LinearPair

BATCH_ROWS = 8
Prepared = Mapping[str, torch.Tensor]

# `lambda` is a word of Python's, so that the field can only be declared like this.
_Strength = create_model("_Strength", __base__=Strict, **{"lambda": (NonNegativeFloat, 100.0)})


class LALoRAOptions(_Strength):  # type: ignore[valid-type,misc]
    """``lambda``: λ. ``sources``: the data sets that P is a sum over, `data.preserve` alone where none is listed."""

    curvature: Literal["diag", "kfac", "kfac_tri"] = "diag"
    sources: list[SourceConfig] = Field(default_factory=list)


class LALoRA(Penalty):
    """λ · Σ vec(θ − μ)ᵀ P vec(θ − μ)."""

    Options = LALoRAOptions
    summary = "Laplace penalty: the adapter's weights are held where source data say that they matter"
    paper = "Sliwa et al., 2025 (LALoRA)"
    metric = "laplace"

    @classmethod
    def needs(cls, options: LALoRAOptions) -> Needs:
        """An adapter, a precision computed once, and preserve rows unless other sources are given."""
        kronecker = options.curvature != "diag"
        return Needs(preserve=not options.sources, adapter=True, pair_alone=kronecker, preparation=True)

    @property
    def weight(self) -> float:
        """λ."""
        return getattr(self.options, "lambda")

    # -- before training -----------------------------------------------------------------------------------------

    def prepare(self, preparation: Preparation) -> dict[str, torch.Tensor]:
        """μ and P, in fp32 on the CPU.

        Returns:
            ``mean/<weight>``: μ of every trained weight that has a precision. Diagonal: ``D/<weight>``. Kronecker:
            ``<source>/<factor>/<layer>``, and ``groups``: for every layer in alphabetical order the number of the layer
            under whose name its A₀₀ is kept.

        Raises:
            UserError: a source cannot be read or has nothing to learn from, the curvature does not apply to this form
                of adapter, or a statistic is NaN or inf.
        """
        from harness.statistics.adapter_curvature import linear_pairs, trained_weights

        model, method = preparation.model, preparation.task.config.method["name"]
        weights = trained_weights(model)
        if not any(".lora_" in name for name in weights):
            raise UserError(
                f"penalties: lalora holds the weights of an adapter, and method {method!r} "
                "has none; use an adapter method (lora, corda)"
            )
        sources = [list(self._rows(preparation, number)) for number in range(max(1, len(self.options.sources)))]
        if self.options.curvature == "diag":
            tensors = self._diagonal(preparation, sources)
            names = [key.removeprefix("D/") for key in tensors]
        else:
            pairs = linear_pairs(model)
            if pairs is None:
                other = next(iter(sorted({name.rsplit(".lora_", 1)[-1] for name in weights})))
                raise UserError(
                    f"penalties: lalora with curvature: {self.options.curvature} given; it is for adapters whose A and "
                    f"B are linear layers and all that is trained, and method {method!r} "
                    f"trains lora_{other}; allowed: diag"
                )
            tensors = self._factors(preparation, pairs, sources)
            names = [name for name in weights if self._has_factors(name, tensors)]
        means = {f"mean/{name}": weights[name].detach() for name in names}
        # Clones, since files hold no two names of one storage.
        return {
            key: value.to("cpu", value.dtype if key == "groups" else torch.float32).clone().contiguous()
            for key, value in (means | tensors).items()
        }

    def _rows(self, preparation: Preparation, number: int) -> Iterator[Row]:
        """The rows drawn from one source, sorted by length: less padding and, it being masked, the same numbers."""
        task = preparation.task
        config = task.config
        if self.options.sources:
            source, key = self.options.sources[number], f"penalties.lalora.sources.{number}"
        else:
            assert config.data.preserve is not None  # else the configuration was refused
            source, key = config.data.preserve, "data.preserve"
        chosen = sample(task.read(source, key), source.samples, "lalora", config.train.seed, number)
        useful = [row for row in task.rows(chosen, f"tokenise {key}") if row.has_loss]
        if not useful:
            raise UserError(f"{key}: no sampled row has a labelled token; check its columns and data.max_length")
        yield from sorted(useful, key=lambda row: len(row.input_ids))

    def _batches(self, rows: Sequence[Row], size: int = BATCH_ROWS) -> Iterator[Batch]:
        """This rank's batches of ``size`` rows, made one after the other: images are opened with their batch."""
        for batch in share([rows[start : start + size] for start in range(0, len(rows), size)]):
            yield collate(batch, self.setup.pad_id)

    def _diagonal(self, preparation: Preparation, sources: Sequence[Sequence[Row]]) -> dict[str, torch.Tensor]:
        from harness.statistics.adapter_curvature import diagonal_fisher, goes_by_rows

        model = preparation.model
        size = 1 if goes_by_rows(model) else BATCH_ROWS
        total: dict[str, torch.Tensor] = {}
        for rows in sources:
            found = diagonal_fisher(model, self._batches(rows, size), preparation.task.objective)
            for name, block in found.items():
                total[f"D/{name}"] = total[f"D/{name}"] + block if f"D/{name}" in total else block
        return total

    def _factors(
        self, preparation: Preparation, pairs: Mapping[str, "LinearPair"], sources: Sequence[Sequence[Row]]
    ) -> dict[str, torch.Tensor]:
        """Each source's own factors: a sum of Kronecker products is not the product of sums."""
        from harness.models.sharing import input_groups
        from harness.statistics.adapter_curvature import kronecker_factors

        device = next(preparation.model.parameters()).device
        task = preparation.task
        probe = collate([task.probe_row(sources[0][0])], self.setup.pad_id)
        inputs = {name: tensor.to(device) for name, tensor in probe.items()}
        layers: dict[str, Any] = {name: pair.layer for name, pair in pairs.items()}
        groups = input_groups(preparation.model, layers, arguments(preparation.model, inputs))
        order = {name: number for number, name in enumerate(sorted(pairs))}
        tensors = {"groups": torch.tensor([order[groups[name]] for name in order])}
        cross = self.options.curvature == "kfac_tri"
        for number, rows in enumerate(sources):
            found = kronecker_factors(preparation.model, pairs, groups, self._batches(rows), cross, task.objective)
            tensors |= {f"{number}/{f}/{name}": matrix for f, named in found.items() for name, matrix in named.items()}
        return tensors

    @staticmethod
    def _has_factors(weight: str, tensors: Prepared) -> bool:
        layer, _, side = weight.rpartition(".lora_")
        return f"0/{'G11' if side.startswith('A') else 'G22'}/{layer}" in tensors

    # -- in training ---------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Put this rank's part of P on the device."""
        from harness.adapters.lora import saved_name

        inner = model.module if hasattr(model, "module") else model
        named = {saved_name(name): parameter for name, parameter in inner.named_parameters() if parameter.requires_grad}
        prepared = self.setup.prepared
        names = sorted(key.removeprefix("mean/") for key in prepared if key.startswith("mean/"))
        parameters = {name: named[name] for name in names}
        self._parameters = list(parameters.values())  # gathered on all ranks, whoever computes with them
        if "groups" in prepared:
            self._forms = kronecker_forms(prepared, parameters, rank(), world_size())
        else:
            self._forms = diagonal_forms(prepared, parameters, rank(), world_size())
        self._zero = self._parameters[0].new_zeros((), dtype=torch.float32)

    def before(self, model: nn.Module, at: MicroStep, rows: Batch | None, batch: Batch) -> list[Evaluated] | None:
        """Values and gradients of this rank's layers, in the last pass of the step."""
        if at.part < at.parts - world_size():
            return None
        with gathered(self._parameters):
            return [form.evaluate() for form in self._forms]

    def penalty(
        self,
        model: nn.Module,
        at: MicroStep,
        rows: Batch | None,
        logits: torch.Tensor | None,
        prepared: list[Evaluated] | None,
    ) -> torch.Tensor | None:
        """The term of this rank's layers; None in passes other than the last."""
        if prepared is None:
            return None
        return sum((evaluated.differentiable() for evaluated in prepared), start=self._zero)


def diagonal_forms(prepared: Prepared, parameters: Mapping[str, nn.Parameter], number: int, ranks: int) -> list[Form]:
    """The part of rank ``number`` of ``ranks`` in a diagonal P."""
    own = dealt(list(parameters), lambda name: prepared[f"mean/{name}"].numel(), number, ranks)
    if not own:
        return []
    chosen = [parameters[name] for name in own]
    return [DiagonalForm(chosen, [prepared[f"mean/{n}"] for n in own], [prepared[f"D/{n}"] for n in own])]


def kronecker_forms(prepared: Prepared, parameters: Mapping[str, nn.Parameter], number: int, ranks: int) -> list[Form]:
    """The part of rank ``number`` of ``ranks`` in a P of Kronecker blocks, one form for all blocks of a shape."""
    sources = sorted({key.split("/")[0] for key in prepared if key.split("/")[1:2] == ["G22"]}, key=int)
    layers = sorted(key.removeprefix("0/G22/") for key in prepared if key.startswith("0/G22/"))
    group_of = {layer: layers[index] for layer, index in zip(layers, prepared["groups"].tolist(), strict=True)}
    a_name, b_name = "{}.lora_A.weight".format, "{}.lora_B.weight".format
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(group_of[layer], []).append(layer)

    def cost(group: str) -> int:
        blocks = [prepared[f"0/G22/{layer}"].numel() for layer in groups[group]]
        shared = prepared.get(f"0/A00/{group}")
        return sum(blocks) + (0 if shared is None else shared.numel())

    own = dealt(sorted(groups), cost, number, ranks)
    mine = [layer for group in own for layer in groups[group]]
    forms: list[Form] = []
    for source in sources:
        a_units = []  # layers with a block of A, by group
        for group in own:
            members = [layer for layer in groups[group] if f"{source}/G11/{layer}" in prepared]
            if members:
                G = torch.block_diag(*(prepared[f"{source}/G11/{layer}"] for layer in members))
                a_units.append(([a_name(layer) for layer in members], G, prepared[f"{source}/A00/{group}"]))
        b_units = [
            ([b_name(layer)], prepared[f"{source}/G22/{layer}"], prepared[f"{source}/A11/{layer}"])
            for layer in mine
            if b_name(layer) in parameters
        ]
        for units in (*_by_shape(a_units), *_by_shape(b_units)):
            forms.append(
                KroneckerForm(
                    [[parameters[name] for name in names] for names, _, _ in units],
                    [[prepared[f"mean/{name}"] for name in names] for names, _, _ in units],
                    torch.stack([G for _, G, _ in units]),
                    torch.stack([A for _, _, A in units]),
                )
            )
        crossed = [
            (layer, prepared[f"{source}/G12/{layer}"], prepared[f"{source}/A01/{layer}"])
            for layer in mine
            if f"{source}/G12/{layer}" in prepared and b_name(layer) in parameters
        ]
        for units in _by_shape(crossed):
            names = [layer for layer, _, _ in units]
            sides = ([a_name(layer) for layer in names], [b_name(layer) for layer in names])
            forms.append(
                CrossForm(
                    *([parameters[name] for name in side] for side in sides),
                    means=tuple([prepared[f"mean/{name}"] for name in side] for side in sides),
                    G=torch.stack([G for _, G, _ in units]),
                    A=torch.stack([A for _, _, A in units]),
                )
            )
    return forms


def dealt(items: Sequence[str], cost: Callable[[str], int], number: int, ranks: int) -> list[str]:
    """The share of rank ``number``: the costliest item first, each to the rank that has the least so far."""
    loads, own = [0] * ranks, []
    for item in sorted(items, key=lambda item: (-cost(item), item)):
        least = loads.index(min(loads))
        loads[least] += cost(item)
        if least == number:
            own.append(item)
    return own


def _by_shape(units: Sequence[tuple[Any, torch.Tensor, torch.Tensor]]) -> list[list[Any]]:
    """Units whose two factors have equal shapes, together."""
    buckets: dict[Any, list[Any]] = {}
    for unit in units:
        buckets.setdefault((unit[1].shape, unit[2].shape), []).append(unit)
    return list(buckets.values())
