"""K–T frontiers on the tiny world: methods × learning rates × seeds, every checkpoint evaluated.

    .venv/bin/python benchmarks/tiny_frontier.py              two to three hours on two cores; resumable
    .venv/bin/python benchmarks/tiny_frontier.py --only FARSS "FARSS + anchor" --seeds 0
    .venv/bin/python benchmarks/tiny_frontier.py --summarise  tables, JSON and figure from the finished cells

A table at one learning rate and one stopping time misleads: both decide as much as the method. So each method runs at
several rates, every checkpoint counts, and methods are compared by K at matched T (`frontier_summary`). T is the exact
match on the new skill, K the share of the base's knowledge that is left (FARSS Eq. 36): on facts that preserve prompts
ask about (seen) and on facts that are in no preserve prompt (held out), averaged.

The three best adapter methods run again on a second pre-trained base (other facts, other weights).

Cells are shared out over two single-thread workers: at this model size two processes beat one with two threads. A cell
with results is never run again; delete its folder to do so.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frontier_summary import best_methods, draw, print_tables, summarise

from harness.demo import tiny_config
from harness.files import read_json, write_json
from harness.gang import quiet_libraries
from harness.tiny import PretrainOptions, SkillOptions, TinyOptions, TinyWorld, WorldOptions, build

STEPS, SAVE_STEPS = 600, 100
RESULTS = Path(__file__).parent / "results" / "tiny_frontier.json"
FIGURE = Path(__file__).parent / "results" / "tiny_frontier.png"


@dataclass(frozen=True)
class Study:
    """How one method is run: its overrides of the demo's recipe, its learning rates, its seeds."""

    overrides: tuple[str, ...]
    rates: tuple[float, ...] = (1.0e-3, 2.0e-3, 3.0e-3)
    seeds: tuple[int, ...] = (0, 1, 2)


ANCHOR = "anchor={kl: 1.0, prompts_per_step: 4}"
NF4 = "model.quantization=nf4"
ROUNDS = "data.preserve.samples=256"  # of 560 rows: sampling rounds that can differ
LORA = "method={name: lora, rank: 16}"
KPM = "method={name: corda, mode: kpm, rank: 16}"
KPM_PLUS = "method={name: corda, mode: kpm, rank: 16, rounds: 5, dynamic_rank: true}"
IPM_PLUS = "method={name: corda, mode: ipm, rank: 16, rounds: 5, dynamic_rank: true}"
# r_min 1, r_avg 50, r_max 64 at R = 128 (FARSS, §4), scaled to R = 16; one shallow block of four (upper end of §3.1).
FARSS = "method={name: farss, rank: 16, r_min: 1, r_avg: 6, r_max: 8, shallow_layers: 1}"
# A method that trains the largest components forgets at rates where others have hardly begun, so it runs at lower ones.
TWO, LOWER = {"rates": (1.0e-3, 2.0e-3), "seeds": (0, 1)}, {"rates": (3.0e-4, 1.0e-3), "seeds": (0, 1)}

STUDIES: dict[str, Study] = {
    "LoRA": Study((LORA,)),
    "LoRA + anchor": Study((LORA, ANCHOR)),
    "CorDA-KPM": Study((KPM,)),
    "CorDA-KPM + anchor": Study((KPM, ANCHOR)),
    "CorDA++-KPM": Study((KPM_PLUS, ROUNDS)),
    "CorDA++-KPM + anchor": Study((KPM_PLUS, ROUNDS, ANCHOR)),
    # CorDA++ is two choices: each alone, at the rate at which CorDA-KPM learns and keeps.
    "CorDA-KPM, 5 rounds": Study(("method={name: corda, mode: kpm, rank: 16, rounds: 5}", ROUNDS), rates=(1.0e-3,)),
    "CorDA-KPM, dynamic rank": Study(
        ("method={name: corda, mode: kpm, rank: 16, dynamic_rank: true}",), rates=(1.0e-3,)
    ),
    "FARSS": Study((FARSS,)),
    "FARSS + anchor": Study((FARSS, ANCHOR)),
    "full": Study(("method={name: full}",), rates=(5.0e-4, 1.0e-3, 2.0e-3)),
    "CorDA-IPM": Study(("method={name: corda, mode: ipm, rank: 16}",), rates=(3.0e-4, 1.0e-3, 2.0e-3, 3.0e-3)),
    "CorDA++-IPM": Study((IPM_PLUS,), **LOWER),
    "PiSSA": Study(("method={name: pissa, rank: 16}",), **LOWER),
    "MiLoRA": Study(("method={name: milora, rank: 16}",), **TWO),
    "LoRA-Null": Study(("method={name: lora_null, rank: 16}",), **TWO),
    "QLoRA": Study((LORA, NF4), **TWO),
    "LoftQ": Study(("method={name: loftq, rank: 16}", NF4), **TWO),
    "QPiSSA": Study(("method={name: pissa, rank: 16}", NF4), **LOWER),
    "QCorDA++": Study((IPM_PLUS, NF4), **LOWER),
}
SECOND = " (second base)"
SECOND_BASE = TinyOptions(world=WorldOptions(seed=1), skill=SkillOptions(seed=1), pretrain=PretrainOptions(seed=1))


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        slug = self.method.lower().replace(" + ", "-").replace("++", "pp")
        slug = slug.replace("(second base)", "base2").replace(",", "").replace(" ", "-")
        return f"{slug}-lr{self.rate:g}-seed{self.seed}"

    def finished(self, out: Path) -> bool:
        return (out / self.name / "eval" / "results.json").is_file()


def cells(studies: dict[str, Study]) -> list[Cell]:
    """The grid of ``studies``, seed by seed."""
    seeds = sorted({seed for study in studies.values() for seed in study.seeds})
    return [
        Cell(method, rate, seed)
        for seed in seeds
        for method, study in studies.items()
        if seed in study.seeds
        for rate in study.rates
    ]


def world_of(method: str) -> TinyWorld:
    """The world whose base ``method`` starts from."""
    return build(options=SECOND_BASE) if method.endswith(SECOND) else build()


def configuration(cell: Cell, out: Path) -> Any:
    """The demo's recipe at this cell's method, rate and seed."""
    study = STUDIES[cell.method.removesuffix(SECOND)]
    overrides = [
        *study.overrides,
        f"train.learning_rate={cell.rate}",
        f"train.seed={cell.seed}",
        f"train.max_steps={STEPS}",
        f"train.save_steps={SAVE_STEPS}",
        "train.preserve_loss_steps=null",
        "train.log_steps=20",
    ]
    return tiny_config(world_of(cell.method), cell.name, overrides, out)


def work(mine: Sequence[Cell], phase: str, out: Path) -> None:
    """Train (on a gang of one inside this process) or evaluate this worker's cells."""
    from harness.pipeline import GANG_STAGES, run_stages

    quiet_libraries()
    if phase == "train":
        from harness.training.distributed import join_ranks

        join_ranks()
    for number, cell in enumerate(mine, start=1):
        run_stages(configuration(cell, out), list(GANG_STAGES) if phase == "train" else ["eval"])
        print(f"{phase} {number}/{len(mine)} {cell.name}", flush=True)


def run_workers(pending: Sequence[Cell], workers: int, out: Path) -> None:
    """Train, then evaluate ``pending``, shared over worker processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for phase in ("train", "eval"):
        command = [sys.executable, __file__, "--out", str(out), "--phase", phase, "--cells"]
        shares = [[cell.name for cell in pending[k::workers]] for k in range(workers)]
        processes = [subprocess.Popen([*command, *names], env=environment) for names in shares if names]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"a worker failed in phase {phase}; run again to go on")


def read_points(studies: dict[str, Study], out: Path) -> list[dict[str, Any]]:
    """Every evaluated checkpoint of every finished cell: method, rate, seed, step, T, K and the scores behind them."""
    points = []
    for cell in cells(studies):
        if not cell.finished(out):
            continue
        for model in read_json(out / cell.name / "eval" / "results.json")["models"]:
            if model["step"] is not None:
                scores = {task: score["value"] for task, score in model["scores"].items()}
                points.append(
                    {"method": cell.method, "rate": cell.rate, "seed": cell.seed, "step": model["step"]}
                    | {"T": model["T"], "K": model["K"], "scores": scores}
                )
    return points


def read_curves(studies: dict[str, Study], out: Path) -> list[dict[str, Any]]:
    """The training loss of every finished cell: mean over the 20 steps that end at each logged step."""
    curves = []
    for cell in cells(studies):
        if cell.finished(out):
            lines = map(json.loads, (out / cell.name / "metrics.jsonl").read_text().splitlines())
            losses = [[line["step"], line["loss"]] for line in lines if "loss" in line]
            curves.append({"method": cell.method, "rate": cell.rate, "seed": cell.seed, "losses": losses})
    return curves


def with_second_base(studies: dict[str, Study], out: Path) -> dict[str, Study]:
    """``studies`` and the three best adapter methods again on the second base, at their two lower rates."""
    best = best_methods(read_points(studies, out))
    return studies | {
        f"{name}{SECOND}": replace(studies[name], rates=studies[name].rates[:2], seeds=(0,)) for name in best
    }


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description="K–T frontiers on the tiny world.")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help=f"of: {', '.join(STUDIES)}")
    parser.add_argument("--seeds", type=int, nargs="+", help="train and evaluate these seeds only")
    parser.add_argument("--summarise", action="store_true", help="only summarise the cells that are finished")
    parser.add_argument("--cells", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--phase", choices=("train", "eval"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out
    if options.cells is not None:
        by_name = {cell.name: cell for cell in cells(with_second_base(STUDIES, out))}
        work([by_name[name] for name in options.cells], options.phase, out)
        return
    for grid in () if options.summarise else (lambda: STUDIES, lambda: with_second_base(STUDIES, out)):
        chosen = {name: study for name, study in grid().items() if not options.only or name in options.only}
        for seed in options.seeds or (0, 1, 2):  # a whole seed at a time: an interrupted run still has whole seeds
            pending = [cell for cell in cells(chosen) if cell.seed == seed and not cell.finished(out)]
            if pending:
                for method in dict.fromkeys(cell.method for cell in pending):
                    world_of(method)  # built here, once, not by two workers at a time
                run_workers(pending, options.workers, out)

    studies = with_second_base(STUDIES, out)
    points = read_points(studies, out)
    summary = summarise(points, read_curves(studies, out))
    print_tables(summary)
    finished = sum(cell.finished(out) for cell in cells(studies))
    setting = {"steps": STEPS, "save_steps": SAVE_STEPS, "batch_size": 32, "rank": 16}
    write_json(
        RESULTS,
        {"setting": setting, "cells": f"{finished} of {len(cells(studies))}", "base": build().info}
        | {"studies": {name: vars(study) for name, study in studies.items()}, "summary": summary, "points": points},
    )
    draw(points, FIGURE)
    print(f"\n{finished} of {len(cells(studies))} cells; {RESULTS} and {FIGURE}")


if __name__ == "__main__":
    main()
