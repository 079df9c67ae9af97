"""Fisher blocks of an adapter's weights the plain way, row by row in float64; and the gang that computes them ours."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from harness.adapters.lora import attach_lora, load_factors
from harness.config import ModelConfig
from harness.data.collation import Batch, collate
from harness.data.tokenisation import Row
from harness.methods.base import LowRank
from harness.models.loading import load_model
from harness.models.sharing import input_groups
from harness.models.targets import target_modules
from harness.statistics.adapter_curvature import diagonal_fisher, kronecker_factors, linear_pairs
from tests.statistics.direct import PAD
from tests.statistics.direct_gradients import labelled_rows, responses
from tests.statistics.forked import run_gangs

RANK = 3
SCALING = 1.5
Tensors = dict[str, torch.Tensor]


def adapted(base: str | Path, zero_b: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The base with a random LoRA on every linear layer; B zero as LoRA starts where asked for."""
    model = load_model(ModelConfig(path=str(base), dtype="float32"))
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, module in target_modules(model, "all-linear").items():
        B = 0.2 * torch.randn(module.out_features, RANK, generator=generator)
        A = 0.2 * torch.randn(RANK, module.in_features, generator=generator)
        factors[name] = LowRank(0 * B if zero_b else B, A, SCALING)
    attached = attach_lora(model, dict.fromkeys(factors, RANK), SCALING)
    load_factors(attached, factors)
    return attached.to(dtype).eval()


def batches(rows: Sequence[Row], size: int, side: str = "right", start: int = 0, step: int = 1) -> list[Batch]:
    """Padded batches of ``size`` rows; with ``start`` and ``step``, a rank's."""
    whole = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [collate(batch, PAD, side) for batch in whole[start::step]]


def groups_of(model: nn.Module) -> dict[str, str]:
    """Adapted layers that read the same tensor."""
    layers = {name: pair.layer for name, pair in linear_pairs(model).items()}
    return input_groups(model, layers, {"input_ids": torch.tensor([[3, 4, 5]]), "use_cache": False})


def log_likelihood(model: nn.Module, row: Row) -> torch.Tensor:
    """Σ log p(label | all before it) over the row's labels, without padding."""
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    return sum((logits[place - 1].log_softmax(-1)[token] for place, token in responses(row)), logits.sum() * 0)


def direct_diagonal(model: nn.Module, rows: Sequence[Row]) -> Tensors:
    """Mean over the rows that have a label of the squared gradient, one call of autograd per row."""
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    sums = {name: torch.zeros_like(w) for name, w in weights.items()}
    useful = [row for row in rows if responses(row)]
    for row in useful:
        gradients = torch.autograd.grad(log_likelihood(model, row), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            sums[name] += gradient * gradient
    short = {n: n.removeprefix("base_model.model.").replace(".default", "") for n in weights}
    return {short[name]: total / len(useful) for name, total in sums.items()}


def pass_of(model: nn.Module, row: Row) -> tuple[dict[tuple[str, str], torch.Tensor], ...]:
    """Inputs and output gradients of every lora_A and lora_B, by layer and side."""
    inputs: dict[tuple[str, str], torch.Tensor] = {}
    outputs: dict[tuple[str, str], torch.Tensor] = {}

    def keep(key: tuple[str, str], given: torch.Tensor, output: torch.Tensor) -> None:
        inputs[key], outputs[key] = given.detach()[0], output

    handles = []
    for name, module in model.named_modules():
        layer, _, side = name.removeprefix("base_model.model.").removesuffix(".default").rpartition(".")
        if side in ("lora_A", "lora_B") and name.endswith(".default"):
            handles.append(
                module.register_forward_hook(lambda _, given, out, key=(layer, side): keep(key, given[0], out))
            )
    value = log_likelihood(model, row)
    for handle in handles:
        handle.remove()
    return inputs, dict(zip(outputs, torch.autograd.grad(value, list(outputs.values())), strict=True))


def direct_factors(model: nn.Module, rows: Sequence[Row]) -> dict[str, Tensors]:
    """All six factors of every layer, token by token."""
    found: dict[str, Tensors] = {f: {} for f in ("A00", "G11", "A11", "G22", "A01", "G12")}
    tokens = 0
    useful = [row for row in rows if responses(row)]
    for row in useful:
        inputs, gradients = pass_of(model, row)
        tokens += len(row.input_ids)
        for layer in sorted({layer for layer, _ in inputs}):
            for t in range(len(row.input_ids)):
                x, a = inputs[layer, "lora_A"][t], inputs[layer, "lora_B"][t]
                g, h = gradients[layer, "lora_A"][0, t], gradients[layer, "lora_B"][0, t]
                pieces = {"A00": (x, x), "G11": (g, g), "A11": (a, a), "G22": (h, h), "A01": (x, a), "G12": (g, h)}
                for factor, (left, right) in pieces.items():
                    product = torch.outer(left, right)
                    found[factor][layer] = found[factor].get(layer, 0) + product
    counts = {"A": tokens, "G": len(useful)}
    return {f: {layer: total / counts[f[0]] for layer, total in named.items()} for f, named in found.items()}


def vec(matrix: torch.Tensor) -> torch.Tensor:
    """The columns of a matrix, one below the other."""
    return matrix.T.reshape(-1)


def dense_precision(factors: dict[str, Tensors], layer: str, curvature: str) -> torch.Tensor:
    """The precision of [vec A; vec B] of one layer as a whole matrix (Eq. 11 and 12)."""
    of_A = torch.kron(factors["A00"][layer], factors["G11"][layer])
    of_B = torch.kron(factors["A11"][layer], factors["G22"][layer])
    between = torch.kron(factors["A01"][layer], factors["G12"][layer])
    if curvature == "kfac":
        between = torch.zeros_like(between)
    return torch.cat([torch.cat([of_A, between], 1), torch.cat([between.T, of_B], 1)])


def one_rank(number: int, ranks: int, port: int, base: str, folder: Path) -> None:
    """A rank of a gloo gang. Shares differ in size; where there are several ranks the last one has no batch at all."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=ranks)
    model = adapted(base, dtype=torch.float32)
    working = max(1, ranks - 1)
    mine = batches(labelled_rows(20), 3, start=number, step=working) if number < working else []
    found = diagonal_fisher(model, mine)
    factors = kronecker_factors(model, linear_pairs(model), groups_of(model), mine, cross=True)
    found |= {f"{factor}/{name}": m for factor, named in factors.items() for name, m in named.items()}
    save_file({k: v.clone() for k, v in found.items()}, folder / f"{ranks}-{number}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_gangs(one_rank, *sys.argv[1:])
