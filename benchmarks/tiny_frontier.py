"""K–T frontiers on the tiny world: methods × learning rates × seeds, every checkpoint evaluated.

    .venv/bin/python benchmarks/tiny_frontier.py              about an hour on two cores; resumable
    .venv/bin/python benchmarks/tiny_frontier.py --summarise  table, JSON and figure from the finished cells

A table at one learning rate and one stopping time misleads: both decide as much as the method. So each method runs at
several rates, every checkpoint counts, and methods are compared by K at matched T: per seed, the upper frontier of all
its (T, K) points, interpolated linearly; then mean ± standard deviation over seeds. T is the exact match on the new
skill, K the share of the base's knowledge that is left (FARSS Eq. 36): on facts that preserve prompts ask about
(seen) and on facts that are in no preserve prompt (held out), averaged.

Cells are shared out over two single-thread workers: at this model size two processes beat one with two threads.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.demo import tiny_config
from harness.files import read_json, write_json
from harness.tiny import build

SEEDS = (0, 1, 2)
STEPS, SAVE_STEPS = 600, 100
MATCHED_T = (0.5, 0.8, 0.9, 0.95)
RESULTS = Path(__file__).parent / "results" / "tiny_frontier.json"
FIGURE = Path(__file__).parent / "results" / "tiny_frontier.png"
ADAPTER_RATES, FULL_RATES = (1.0e-3, 2.0e-3, 3.0e-3), (5.0e-4, 1.0e-3, 2.0e-3)
ANCHOR = "anchor={kl: 1.0, prompts_per_step: 4}"
METHODS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "LoRA": (["method={name: lora, rank: 16}"], ADAPTER_RATES),
    "CorDA-KPM": (["method={name: corda, mode: kpm, rank: 16}"], ADAPTER_RATES),
    "CorDA-IPM": (["method={name: corda, mode: ipm, rank: 16}"], ADAPTER_RATES),
    "LoRA + anchor": (["method={name: lora, rank: 16}", ANCHOR], ADAPTER_RATES),
    "CorDA-KPM + anchor": (["method={name: corda, mode: kpm, rank: 16}", ANCHOR], ADAPTER_RATES),
    "full": (["method={name: full}"], FULL_RATES),
}


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        slug = self.method.lower().replace(" + ", "-").replace(" ", "-")
        return f"{slug}-lr{self.rate:g}-seed{self.seed}"


def cells(seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """The grid, seed by seed."""
    return [Cell(method, rate, seed) for seed in seeds for method, (_, rates) in METHODS.items() for rate in rates]


def configuration(cell: Cell, out: Path) -> Any:
    """The demo's recipe at this cell's method, rate and seed."""
    overrides = [
        *METHODS[cell.method][0],
        f"train.learning_rate={cell.rate}",
        f"train.seed={cell.seed}",
        f"train.max_steps={STEPS}",
        f"train.save_steps={SAVE_STEPS}",
        "train.preserve_loss_steps=null",
        "train.log_steps=20",
    ]
    return tiny_config(build(), cell.name, overrides, out)


def work(mine: list[Cell], phase: str, out: Path) -> None:
    """Train (on a gang of one inside this process) or evaluate this worker's cells."""
    from harness.pipeline import GANG_STAGES, run_stages

    if phase == "train":
        from harness.training.distributed import join_ranks

        join_ranks()
    for number, cell in enumerate(mine, start=1):
        run_stages(configuration(cell, out), list(GANG_STAGES) if phase == "train" else ["eval"])
        print(f"{phase} {number}/{len(mine)} {cell.name}", flush=True)


def run_workers(phase: str, seed: int, workers: int, out: Path) -> None:
    """All cells of one phase of one seed, shared over worker processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, "--out", str(out), "--workers", str(workers), "--phase", phase]
    command += ["--seeds", str(seed)]
    processes = [subprocess.Popen([*command, "--worker", str(k)], env=environment) for k in range(workers)]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"a worker failed in phase {phase}; run again to go on")


def read_points(out: Path) -> list[dict[str, Any]]:
    """Every evaluated checkpoint of every finished cell: method, rate, seed, step, T, K and the scores behind them."""
    points = []
    for cell in cells():
        results = out / cell.name / "eval" / "results.json"
        if not results.is_file():
            continue
        for model in read_json(results)["models"]:
            if model["step"] is not None:
                scores = {task: score["value"] for task, score in model["scores"].items()}
                points.append(
                    {"method": cell.method, "rate": cell.rate, "seed": cell.seed, "step": model["step"]}
                    | {"T": model["T"], "K": model["K"], "scores": scores}
                )
    return points


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (T, K) points that no other point beats on both axes, T ascending."""
    best: list[tuple[float, float]] = []
    for t, k in sorted(points, reverse=True):
        if not best or k > best[-1][1]:
            best.append((t, k))
    return best[::-1]


def k_at(front: list[tuple[float, float]], t: float) -> float | None:
    """K on the frontier at T = t, interpolated linearly; None where the method never got that far."""
    if t > front[-1][0]:
        return None
    for (t0, k0), (t1, k1) in itertools.pairwise(front):
        if t0 <= t <= t1:
            return k0 + (k1 - k0) * (t - t0) / (t1 - t0)
    return front[0][1]


def summarise(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method: K at matched T (mean, standard deviation, seeds that got there), and every end point."""
    summary = {}
    for method in METHODS:
        rows = {}
        for t in MATCHED_T:
            values = []
            for seed in SEEDS:
                mine = [(p["T"], p["K"]) for p in points if p["method"] == method and p["seed"] == seed]
                value = k_at(frontier(mine), t) if mine else None
                if value is not None:
                    values.append(value)
            rows[str(t)] = {
                "seeds": len(values),
                "mean": statistics.mean(values) if values else None,
                "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
            }
        summary[method] = {"K_at_T": rows, "end_points": _end_points(points, method)}
    return summary


def _end_points(points: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    ends = []
    for rate in METHODS[method][1]:
        mine = [p for p in points if p["method"] == method and p["rate"] == rate and p["step"] == STEPS]
        entry: dict[str, Any] = {"rate": rate, "seeds": len(mine)}
        for axis in ("T", "K"):
            values = [p[axis] for p in mine]
            entry[axis] = statistics.mean(values) if values else None
            entry[f"{axis}_standard_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        ends.append(entry)
    return ends


def print_tables(summary: dict[str, Any]) -> None:
    """K at matched T, and where each rate ended, as Markdown."""
    print("\nK at matched T (mean ± standard deviation over seeds; n = seeds that reached that T)\n")
    print("| method | " + " | ".join(f"T = {t}" for t in MATCHED_T) + " |")
    print("|---|" + "---|" * len(MATCHED_T))
    for method, entry in summary.items():
        print(f"| {method} | " + " | ".join(_cell(entry["K_at_T"][str(t)]) for t in MATCHED_T) + " |")
    print(f"\nAt the last step ({STEPS}), T / K\n")
    for method, entry in summary.items():
        ends = "; ".join(
            f"lr {end['rate']:g}: {_pm(end, 'T')} / {_pm(end, 'K')}" for end in entry["end_points"] if end["seeds"]
        )
        print(f"- {method}: {ends}")


def _cell(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "not reached"
    spread = "" if row["standard_deviation"] is None else f" ± {row['standard_deviation']:.2f}"
    return f"{row['mean']:.2f}{spread} (n={row['seeds']})"


def _pm(end: dict[str, Any], axis: str) -> str:
    spread = end[f"{axis}_standard_deviation"]
    return f"{end[axis]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Every point, and each method's mean frontier with a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(9.5, 5.5), constrained_layout=True)
    grid = np.linspace(0, 1, 101)
    colours = ["#0072B2", "#E69F00", "#999999", "#56B4E9", "#D55E00", "#000000"]  # Okabe and Ito
    for method, colour in zip(METHODS, colours, strict=True):
        mine = [p for p in points if p["method"] == method]
        if not mine:
            continue
        axes.scatter([p["T"] for p in mine], [p["K"] for p in mine], s=9, color=colour, alpha=0.35, linewidths=0)
        curves = []
        for seed in sorted({p["seed"] for p in mine}):
            front = frontier([(p["T"], p["K"]) for p in mine if p["seed"] == seed])
            curves.append([np.nan if (k := k_at(front, t)) is None else k for t in grid])
        stack = np.array(curves)
        reached = ~np.isnan(stack).any(axis=0)  # only where every seed got there: a mean over fewer would jump
        mean, spread = stack[:, reached].mean(axis=0), stack[:, reached].std(axis=0)
        axes.plot(grid[reached], mean, color=colour, label=method, linewidth=2)
        axes.fill_between(grid[reached], mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    axes.set(
        xlabel="T: exact match on the new skill", ylabel="K: share of the base's knowledge that is left",
        xlim=(-0.02, 1.02), ylim=(-0.02, 1.06), title="Tiny world: what each method can keep at what it has learned",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description="K–T frontiers on the tiny world.")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="train and evaluate these seeds only")
    parser.add_argument("--summarise", action="store_true", help="only summarise the cells that are finished")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--phase", choices=("train", "eval"), default="train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(cells(options.seeds)[options.worker :: options.workers], options.phase, options.out)
        return
    if not options.summarise:
        build()
        for seed in options.seeds:  # a whole seed at a time, so that an interrupted run still has whole seeds
            for phase in ("train", "eval"):
                run_workers(phase, seed, options.workers, options.out)
    points = read_points(options.out)
    summary = summarise(points)
    print_tables(summary)
    finished = len({(p["method"], p["rate"], p["seed"]) for p in points})
    setting = {"steps": STEPS, "save_steps": SAVE_STEPS, "seeds": SEEDS, "batch_size": 32, "rank": 16}
    write_json(
        RESULTS,
        {"setting": setting, "cells": f"{finished} of {len(cells())}", "base": build().info}
        | {"summary": summary, "points": points},
    )
    draw(points, FIGURE)
    print(f"\n{finished} of {len(cells())} cells; {RESULTS} and {FIGURE}")
    print(json.dumps(setting))


if __name__ == "__main__":
    main()
