"""The grid of training runs that the frontier benchmarks share: cells, workers, points.

A cell is one run of the demo's recipe at one method, learning rate and seed. Cells are shared out over single-thread
worker processes: at the tiny model's size two processes beat one with two threads. A cell with results is never run
again; delete its folder to do so.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.embedded import tiny_config
from harness.files import read_json
from harness.gang import quiet_libraries
from harness.tiny import TinyWorld, build

STEPS, SAVE_STEPS = 600, 100
Point = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """How one method is run: its overrides of the demo's recipe, its learning rates, its seeds."""

    overrides: tuple[str, ...]
    rates: tuple[float, ...] = (1.0e-3, 2.0e-3, 3.0e-3)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The run's name: what it is called in the tables, without characters that a folder should not have."""
        slug = self.method.lower().replace(" + ", "-").replace("++", "pp").replace("%", "pc").replace("λ=", "lambda")
        slug = re.sub(r"[,+]", "", slug.replace("(second base)", "base2")).replace(" ", "-")
        return f"{slug}-lr{self.rate:g}-seed{self.seed}"

    def finished(self, out: Path) -> bool:
        """Whether it has results."""
        return (out / self.name / "eval" / "results.json").is_file()


@dataclass(frozen=True)
class Grid:
    """Studies by name, where their runs lie, and the world that each starts from (the demo's by default)."""

    studies: Mapping[str, Study]
    out: Path
    script: Path  # the benchmark that is called again for each worker
    world_of: Callable[[str], TinyWorld] = lambda method: build()

    def cells(self) -> list[Cell]:
        """All cells, seed by seed."""
        seeds = sorted({seed for study in self.studies.values() for seed in study.seeds})
        return [
            Cell(method, rate, seed)
            for seed in seeds
            for method, study in self.studies.items()
            if seed in study.seeds
            for rate in study.rates
        ]

    def configuration(self, cell: Cell) -> Any:
        """The demo's recipe at this cell's method, rate and seed."""
        overrides = [
            *self.studies[cell.method].overrides,
            f"train.learning_rate={cell.rate}",
            f"train.seed={cell.seed}",
            f"train.max_steps={STEPS}",
            f"train.save_steps={SAVE_STEPS}",
            "train.preserve_loss_steps=null",
            "train.log_steps=20",
        ]
        return tiny_config(self.world_of(cell.method), cell.name, overrides, self.out)

    def run(self, pending: Sequence[Cell], workers: int) -> None:
        """Train, then evaluate ``pending``, shared over worker processes."""
        for method in dict.fromkeys(cell.method for cell in pending):
            self.world_of(method)  # built here, once, not by two workers at a time
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        for phase in PHASES:
            command = [sys.executable, str(self.script), "--out", str(self.out), "--phase", phase, "--cells"]
            shares = [[cell.name for cell in pending[k::workers]] for k in range(workers)]
            processes = [subprocess.Popen([*command, *names], env=environment) for names in shares if names]
            codes = [process.wait() for process in processes]
            if any(codes):
                raise SystemExit(f"a worker failed in phase {phase}; run again to go on")

    def work(self, names: Sequence[str], phase: str) -> None:
        """One phase of one worker's cells; training runs on a gang of one inside this process."""
        from harness.pipeline import run_stages

        by_name = {cell.name: cell for cell in self.cells()}
        quiet_libraries()
        if phase == "train":
            from harness.training.distributed import join_ranks

            join_ranks()
        for number, name in enumerate(names, start=1):
            run_stages(self.configuration(by_name[name]), list(PHASES[phase]))
            print(f"{phase} {number}/{len(names)} {name}", flush=True)

    def points(self) -> list[Point]:
        """Every evaluated checkpoint of every finished cell: method, rate, seed, step, T, K and the scores behind."""
        points = []
        for cell in self.cells():
            if not cell.finished(self.out):
                continue
            for model in read_json(self.out / cell.name / "eval" / "results.json")["models"]:
                if model["step"] is not None:
                    scores = {task: score["value"] for task, score in model["scores"].items()}
                    points.append(
                        {"method": cell.method, "rate": cell.rate, "seed": cell.seed, "step": model["step"]}
                        | {"T": model["T"], "K": model["K"], "scores": scores}
                    )
        return points

    def curves(self) -> list[dict[str, Any]]:
        """The training loss of every finished cell: mean over the 20 steps that end at each logged step."""
        curves = []
        for cell in self.cells():
            if cell.finished(self.out):
                lines = map(json.loads, (self.out / cell.name / "metrics.jsonl").read_text().splitlines())
                losses = [[line["step"], line["loss"]] for line in lines if "loss" in line]
                curves.append({"method": cell.method, "rate": cell.rate, "seed": cell.seed, "losses": losses})
        return curves

    def finished(self) -> str:
        """How many cells have results, in words."""
        cells = self.cells()
        return f"{sum(cell.finished(self.out) for cell in cells)} of {len(cells)}"


PHASES: dict[str, tuple[str, ...]] = {
    "answers": ("answers",),
    "train": ("calibrate", "init", "prepare", "train", "export"),
    "eval": ("eval",),
}


def parser(description: str, studies: Mapping[str, Study]) -> argparse.ArgumentParser:
    """The arguments that every frontier benchmark takes."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--out", type=Path, default=Path("runs/frontier"))
    found.add_argument("--workers", type=int, default=2)
    found.add_argument("--only", nargs="+", metavar="METHOD", help=f"of: {', '.join(studies)}")
    found.add_argument("--seeds", type=int, nargs="+", help="train and evaluate these seeds only")
    found.add_argument("--summarise", action="store_true", help="only summarise the cells that are finished")
    found.add_argument("--cells", nargs="+", help=argparse.SUPPRESS)
    found.add_argument("--phase", choices=tuple(PHASES), help=argparse.SUPPRESS)
    return found
