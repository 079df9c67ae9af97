"""Covariances the plain way, and the gang that computes them the harness's way."""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.config import ModelConfig
from harness.data.collation import collate
from harness.data.tokenisation import Row
from harness.models.loading import load_model
from harness.models.sharing import input_groups
from harness.models.targets import target_modules
from harness.statistics.covariance import collect_input_covariance
from harness.statistics.statistic import Statistic
from harness.statistics.store import StatisticsWriter
from tests.statistics.forked import run_gangs

PAD = 2


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of 1 to 24 random tokens, the padding token among them: it is real where a row holds it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 25, (count,), generator=generator).tolist()
    ids = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]
    return [Row(row, row) for row in ids]


def direct_covariances(
    model: PreTrainedModel, modules: dict[str, nn.Linear], rows: list[Row]
) -> dict[str, torch.Tensor]:
    """Mean of x xᵀ of every layer for itself, summed in float64, over unpadded batches of one."""
    sums = {name: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for name, m in modules.items()}

    def add(name: str, inputs: torch.Tensor) -> None:
        x = inputs[0].double()
        sums[name] += x.T @ x

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    tokens = sum(len(row.input_ids) for row in rows)
    return {name: matrix / tokens for name, matrix in sums.items()}


def collected(
    model: PreTrainedModel, rows: list[Row], batch_size: int, side: str = "right", start: int = 0, step: int = 1
) -> tuple[dict[str, Statistic], dict[str, str]]:
    """The harness's covariances; with ``start`` and ``step``, of this rank's batches."""
    modules = target_modules(model, "all-linear")
    groups = input_groups(model, modules, {"input_ids": torch.tensor([[3, 4, 5]]), "use_cache": False})
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)][start::step]
    padded = (collate(batch, PAD, side) for batch in batches)
    return collect_input_covariance(model, modules, groups, padded), groups


def one_rank(number: int, ranks: int, port: int, base: str, folder: Path) -> None:
    """A rank of a gloo gang. Shares differ in size; where there are several ranks the last one has no batch at all."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=ranks)
    model = load_model(ModelConfig(path=base, dtype="float32"))
    working = max(1, ranks - 1)
    mine = make_rows(20) if number < working else []
    covariances, groups = collected(model, mine, 3, start=number, step=working)
    writer = StatisticsWriter(folder / f"{ranks}-ranks" / f"rank-{number}")
    writer.add("input_covariance", covariances, groups)
    writer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_gangs(one_rank, *sys.argv[1:])
