"""The r largest or smallest components of W·C̃: the partial solver, the full Gram matrix and the SVD, timed in turn.

    .venv/bin/python benchmarks/partial_solver.py            about two minutes on one thread
    .venv/bin/python benchmarks/partial_solver.py --quick    small sizes, seconds; writes nothing

``steep``: inputs whose directions fall by a power law, with outlier channels ten times the rest, as layers of language
models have them; ``flat``: white inputs, so that a cut falls in the bulk of a random spectrum, where the partial
solver must give up early. W is square and random. Every time is that of the whole `context_svd` with that solver,
products included; "path" says which one ``partial`` ended with, since it falls back where it is not sure. Errors of B·A
are against the float64 SVD. Ratios are over ``partial``, pair by pair: above 1 the partial solver is faster.
"""

import argparse
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from harness.decomposition.context_svd import ContextSVD, Solver, component_factors, context_svd, damped
from harness.files import write_json

SIZES, RANK, REPEATS = (512, 1024, 2048), 64, 3
QUICK_SIZES, QUICK_RANK = (256, 512), 16
SVD_REPEATS = 1  # it takes several times as long as the others together, and is what they are compared with
DAMPING, OUTLIER = 0.01, 10.0
RESULTS = Path(__file__).parent / "results" / "partial_solver.json"
Spectrum = Literal["steep", "flat"]
Spread = tuple[float, float, float]


@dataclass(frozen=True)
class Cell:
    """One problem: times in seconds and ratios as (min, median, max), relative errors ‖B·A − truth‖ / ‖truth‖."""

    size: int
    spectrum: Spectrum
    end: Literal["largest", "smallest"]
    path: str
    partial_seconds: Spread
    gram_seconds: Spread
    svd_seconds: Spread
    gram_over_partial: Spread
    svd_over_partial: Spread
    partial_error: float
    gram_error: float


def problem(size: int, spectrum: Spectrum) -> tuple[torch.Tensor, torch.Tensor]:
    """W and the damped C, both (size, size)."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=generator) / size**0.5
    X = torch.randn(4 * size, size, generator=generator)
    if spectrum == "steep":
        mixing = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        X = X * torch.arange(1, size + 1).float() ** -0.6 @ mixing
        X[:, :3] *= OUTLIER
    return W, damped(X.T @ X / len(X), DAMPING)


def block(W: torch.Tensor, decomposition: ContextSVD) -> torch.Tensor:
    B, A = component_factors(W, decomposition)
    return B @ A


def measure(size: int, spectrum: Spectrum, smallest: bool, rank: int) -> Cell:
    """Time the three solvers in turn on one problem."""
    W, C = problem(size, spectrum)
    cut, needed = (size - rank, "rest") if smallest else (rank, "first")
    found: dict[Solver, ContextSVD] = {}
    seconds: dict[Solver, list[float]] = {"partial": [], "gram": [], "svd": []}
    for repeat in range(REPEATS):
        for solver in seconds:
            if solver == "svd" and repeat >= SVD_REPEATS:
                continue
            start = time.perf_counter()
            found[solver] = context_svd(W, C, cut, solver, needed)
            seconds[solver].append(time.perf_counter() - start)
    truth = block(W, found["svd"])

    def error(solver: Solver) -> float:
        return float((block(W, found[solver]) - truth).norm() / truth.norm())

    def over_partial(solver: Solver) -> Spread:
        return spread([other / own for other, own in zip(seconds[solver], seconds["partial"], strict=False)])

    return Cell(
        size,
        spectrum,
        "smallest" if smallest else "largest",
        found["partial"].solver,
        *(spread(seconds[solver]) for solver in ("partial", "gram", "svd")),
        over_partial("gram"),
        over_partial("svd"),
        error("partial"),
        error("gram"),
    )


def spread(values: list[float]) -> Spread:
    return min(values), statistics.median(values), max(values)


def main() -> None:
    """Measure every problem, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description="Partial solver against Gram matrix and SVD")
    parser.add_argument("--quick", action="store_true", help="small sizes; write nothing")
    quick = parser.parse_args().quick
    sizes, rank = (QUICK_SIZES, QUICK_RANK) if quick else (SIZES, RANK)
    torch.set_num_threads(1)
    context_svd(*problem(128, "steep"), 8)  # libraries load
    cells = []
    print("size  spectrum end       path     partial [ms]  gram/partial min/med/max  svd/partial  error  gram's error")
    for size in sizes:
        for spectrum in ("steep", "flat"):
            for smallest in (False, True):
                cell = measure(size, spectrum, smallest, rank)
                cells.append(cell)
                ratio = " / ".join(f"{value:.2f}" for value in cell.gram_over_partial)
                median = 1e3 * cell.partial_seconds[1]
                print(
                    f"{size:5} {spectrum:8} {cell.end:9} {cell.path:8} {median:12.0f}  {ratio:24} "
                    f"{cell.svd_over_partial[1]:12.2f}  {cell.partial_error:.0e}  {cell.gram_error:.0e}",
                    flush=True,
                )
    if quick:
        return
    setting = {"rank": rank, "damping": DAMPING, "outlier": OUTLIER, "repeats": REPEATS, "threads": 1}
    versions = {"torch": torch.__version__, "cores": os.cpu_count()}
    write_json(RESULTS, {"setting": setting, "versions": versions, "cells": [asdict(cell) for cell in cells]})
    print(f"written: {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


if __name__ == "__main__":
    main()
