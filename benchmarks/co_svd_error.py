"""CorDA's adapter block at step 0: ours and PEFT's against a float64 truth, with the time each takes.

    .venv/bin/python benchmarks/co_svd_error.py        under half a minute on one thread

Truth: B·A of CorDA++ Eq. 11 and 13 with a float64 inverse and a full float64 SVD (`tests/decomposition/reference.py`).
PEFT: `preprocess_corda` and `get_peft_model` on a model of one layer that is given the covariance. Its damping follows
the reference's rule; its truth takes the damping that this rule arrives at, so that only arithmetic is compared. Ours:
`context_svd` and `component_factors`, rounded to fp32 as the init stage stores them.

Inputs: random weights and covariances with outlier channels 60 times the rest; "deficient": 60 tokens for 256 or 704
channels. Times are taken in turn, ours then PEFT's, and exclude what PEFT does after its decomposition.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import collect_eigens_for_layer, preprocess_corda
from torch import nn

from harness.decomposition.context_svd import component_factors, context_svd, damped, reference_damping
from harness.files import write_json
from tests.decomposition.reference import outlier_problem, paper_block

SHAPES = ((256, 256), (704, 256), (256, 704))
TOKENS = {"full": 4000, "deficient": 60}
RANK, DAMPING, REPEATS = 16, 0.01, 7
RESULTS = Path(__file__).parent / "results" / "co_svd_error.json"
Mode = Literal["kpm", "ipm"]


@dataclass(frozen=True)
class Cell:
    """Relative errors ‖B·A − truth‖ / ‖truth‖ of one problem; times in seconds as (min, median, max)."""

    weight: str
    covariance: str
    mode: Mode
    our_error: float
    peft_error: float
    our_solver: str
    peft_damping: float
    our_seconds: tuple[float, float, float]
    peft_seconds: tuple[float, float, float]
    time_ratio: tuple[float, float, float]  # PEFT's over ours, pair by pair


def our_block(W: torch.Tensor, C: torch.Tensor, mode: Mode) -> tuple[torch.Tensor, str]:
    """B·A of the stored fp32 factors, and the solver taken."""
    components = min(W.shape)
    cut = components - RANK if mode == "kpm" else RANK
    decomposition = context_svd(W, damped(C, DAMPING), cut)
    B, A = component_factors(W, decomposition, slice(cut, components) if mode == "kpm" else slice(0, cut))
    return B.float().double() @ A.float().double(), decomposition.solver


class OneLayer(nn.Module):
    """A model of one linear layer without bias."""

    def __init__(self, W: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.layer.weight.data.copy_(W)


def peft_config(mode: Mode, covariance_file: Path | None = None) -> LoraConfig:
    corda = CordaConfig(corda_method=mode, covariance_file=covariance_file and str(covariance_file))
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"], init_lora_weights="corda", corda_config=corda)


def peft_block(W: torch.Tensor, C: torch.Tensor, mode: Mode) -> torch.Tensor:
    """B·A of the adapter that PEFT initialises."""
    model = OneLayer(W)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "covariance.pt"
        torch.save({"layer": C}, file)
        config = peft_config(mode, file)
        preprocess_corda(model, config)
        layer = get_peft_model(model, config).base_model.model.layer
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return layer.scaling["default"] * (B.detach().double() @ A.detach().double())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def measure(shape: tuple[int, int], covariance: str, mode: Mode) -> Cell:
    """Errors and times of one problem."""
    W, C = outlier_problem(*shape, TOKENS[covariance])
    found, solver = our_block(W, C, mode)
    truth = paper_block(W, C, DAMPING, RANK, mode)
    peft_damping = reference_damping(C)
    peft_truth = paper_block(W, C, peft_damping, RANK, mode)
    peft_found = peft_block(W, C, mode)

    linear, config = OneLayer(W).layer, peft_config(mode)
    linear.covariance_matrix = C.clone()
    ours, theirs = [], []
    for _ in range(REPEATS):
        ours.append(seconds(lambda: our_block(W, C, mode)))
        theirs.append(seconds(lambda: collect_eigens_for_layer(linear, config)))
    return Cell(
        weight=f"{shape[0]}×{shape[1]}",
        covariance=covariance,
        mode=mode,
        our_error=float((found - truth).norm() / truth.norm()),
        peft_error=float((peft_found - peft_truth).norm() / peft_truth.norm()),
        our_solver=solver,
        peft_damping=peft_damping,
        our_seconds=spread(ours),
        peft_seconds=spread(theirs),
        time_ratio=spread([theirs[i] / ours[i] for i in range(REPEATS)]),
    )


def main() -> None:
    """Measure every problem, print a table, write the JSON."""
    torch.set_num_threads(1)
    cells = [measure(shape, covariance, mode) for shape in SHAPES for covariance in TOKENS for mode in ("kpm", "ipm")]
    print("weight    covariance  mode  solver  our error  PEFT error  ours [ms]  PEFT [ms]  PEFT/ours min/median/max")
    for cell in cells:
        ratio = " / ".join(f"{value:.2f}" for value in cell.time_ratio)
        print(
            f"{cell.weight:9} {cell.covariance:11} {cell.mode:5} {cell.our_solver:6} {cell.our_error:10.1e} "
            f"{cell.peft_error:11.1e} {1e3 * cell.our_seconds[1]:10.1f} {1e3 * cell.peft_seconds[1]:10.1f}  {ratio}"
        )
    setting: dict[str, Any] = {"rank": RANK, "damping": DAMPING, "repeats": REPEATS, "threads": 1}
    versions = {"torch": torch.__version__, "peft": peft.__version__, "cores": os.cpu_count()}
    write_json(RESULTS, {"setting": setting, "versions": versions, "cells": [asdict(cell) for cell in cells]})
    print(f"written: {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


if __name__ == "__main__":
    main()
