"""K-FAC factors and weight gradients the plain way, and the gang that computes them the harness's way."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.config import ModelConfig
from harness.data.collation import collate
from harness.data.tokenisation import IGNORED, Row
from harness.models.loading import load_model
from harness.models.sharing import input_groups
from harness.models.targets import target_modules
from harness.statistics.gradients import collect_gradient_statistics
from harness.statistics.statistic import KINDS, Kind, Statistic
from harness.statistics.store import StatisticsWriter
from tests.statistics.direct import PAD, make_rows
from tests.statistics.forked import run_gangs

Matrices = dict[str, dict[str, torch.Tensor]]
Collected = dict[Kind, dict[str, Statistic]]


def labelled_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of `make_rows` with a prompt: a third of the tokens, more or less; the shortest rows have no response."""
    rows = []
    for row in make_rows(count, seed):
        prompt = len(row.input_ids) // 3 + 1
        rows.append(Row(row.input_ids, [IGNORED] * prompt + row.input_ids[prompt:]))
    return rows


def row_gradients(
    model: nn.Module, modules: dict[str, nn.Linear], row: Row, targets: Sequence[tuple[int, int]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Each layer's inputs and output gradients, (tokens, features), of −Σ log p(token | all before position) over
    ``targets``, pairs of position and token."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, given: torch.Tensor, output: torch.Tensor) -> None:
        inputs[name], outputs[name] = given.detach().reshape(-1, given.shape[-1]), output

    handles = [
        module.register_forward_hook(lambda _, given, output, name=name: keep(name, given[0], output))
        for name, module in modules.items()
    ]
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    for handle in handles:
        handle.remove()
    loss = sum((-logits[place - 1].log_softmax(-1)[token] for place, token in targets), start=logits.sum() * 0)
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    return inputs, {
        name: gradient.reshape(-1, gradient.shape[-1]) for name, gradient in zip(outputs, gradients, strict=True)
    }


def responses(row: Row) -> list[tuple[int, int]]:
    """Position and token of everything in ``row`` that has a loss; the first token is predicted by nothing."""
    return [(place, label) for place, label in enumerate(row.labels) if place > 0 and label != IGNORED]


def direct_statistics(model: PreTrainedModel, modules: dict[str, nn.Linear], rows: list[Row]) -> Matrices:
    """All three kinds of every layer for itself, in float64, row by row without padding. ``model`` is of float64."""
    sums: Matrices = {
        "input_covariance": {n: torch.zeros(m.in_features, m.in_features).double() for n, m in modules.items()},
        "output_gradient_covariance": {
            n: torch.zeros(m.out_features, m.out_features).double() for n, m in modules.items()
        },
        "weight_gradient": {n: torch.zeros(m.out_features, m.in_features).double() for n, m in modules.items()},
    }
    tokens = labelled = 0
    for row in rows:
        inputs, gradients = row_gradients(model, modules, row, responses(row))
        tokens += len(row.input_ids)
        labelled += len(responses(row))
        for name in modules:
            sums["input_covariance"][name] += inputs[name].T @ inputs[name]
            sums["output_gradient_covariance"][name] += gradients[name].T @ gradients[name]
            sums["weight_gradient"][name] += gradients[name].T @ inputs[name]
    counts = {"input_covariance": tokens, "output_gradient_covariance": tokens, "weight_gradient": labelled}
    return {kind: {name: matrix / counts[kind] for name, matrix in found.items()} for kind, found in sums.items()}


def groups_of(model: nn.Module, modules: dict[str, nn.Linear]) -> dict[str, str]:
    """Layers that read the same tensor."""
    return input_groups(model, modules, {"input_ids": torch.tensor([[3, 4, 5]]), "use_cache": False})


def collected(
    model: PreTrainedModel,
    rows: list[Row],
    batch_size: int,
    side: str = "right",
    start: int = 0,
    step: int = 1,
    kinds: tuple[Kind, ...] = KINDS,
    **options: object,
) -> Collected:
    """The harness's statistics; with ``start`` and ``step``, of this rank's batches."""
    modules = target_modules(model, "all-linear")
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)][start::step]
    padded = (collate(batch, PAD, side) for batch in batches)
    return collect_gradient_statistics(model, modules, groups_of(model, modules), padded, kinds, **options)


def one_rank(number: int, ranks: int, port: int, base: str, folder: Path) -> None:
    """A rank of a gloo gang. Shares differ in size; where there are several ranks the last one has no batch at all."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=ranks)
    model = load_model(ModelConfig(path=base, dtype="float32"))
    modules = target_modules(model, "all-linear")
    groups = groups_of(model, modules)
    working = max(1, ranks - 1)
    for fisher in ("empirical", "mc"):
        mine = labelled_rows(20) if number < working else []
        found = collected(model, mine, 3, start=number, step=working, fisher=fisher, seed=1)
        writer = StatisticsWriter(folder / f"{fisher}-{ranks}-ranks" / f"rank-{number}")
        for kind, statistics in found.items():
            own = {name: name for name in modules}
            writer.add(kind, statistics, groups if kind == "input_covariance" else own)
        writer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_gangs(one_rank, *sys.argv[1:])
