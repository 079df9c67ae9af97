"""K–T frontiers on the tiny world: methods × learning rates × seeds, every checkpoint evaluated.

    .venv/bin/python benchmarks/tiny_frontier.py              two to three hours on two cores; resumable
    .venv/bin/python benchmarks/tiny_frontier.py --only FARSS "FARSS + anchor" --seeds 0
    .venv/bin/python benchmarks/tiny_frontier.py --summarise  tables, JSON and figure from the finished cells

A table at one learning rate and one stopping time misleads: both decide as much as the method. So each method runs at
several rates, every checkpoint counts, and methods are compared by K at matched T (`frontier_summary`). T is the exact
match on the new skill, K the share of the base's knowledge that is left (FARSS Eq. 36): on facts that preserve prompts
ask about (seen) and on facts that are in no preserve prompt (held out), averaged.

The three best adapter methods run again on a second pre-trained base (other facts, other weights).

A cell with results is never run again; delete its folder to do so.
"""

from dataclasses import replace
from pathlib import Path

from frontier_grid import SAVE_STEPS, STEPS, Grid, Study, parser
from frontier_summary import best_methods, draw, print_tables, summarise

from harness.files import write_json
from harness.tiny import PretrainOptions, SkillOptions, TinyOptions, TinyWorld, WorldOptions, build

RESULTS = Path(__file__).parent / "results" / "tiny_frontier.json"
FIGURE = Path(__file__).parent / "results" / "tiny_frontier.png"

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


def world_of(method: str) -> TinyWorld:
    """The world whose base ``method`` starts from."""
    return build(options=SECOND_BASE) if method.endswith(SECOND) else build()


def with_second_base(studies: dict[str, Study], out: Path) -> dict[str, Study]:
    """``studies`` and the three best adapter methods again on the second base, at their two lower rates."""
    best = best_methods(grid(studies, out).points())
    return studies | {
        f"{name}{SECOND}": replace(studies[name], rates=studies[name].rates[:2], seeds=(0,)) for name in best
    }


def grid(studies: dict[str, Study], out: Path) -> Grid:
    """The grid of ``studies``."""
    return Grid(studies, out, Path(__file__), world_of)


def main() -> None:
    """Run what is missing, then summarise."""
    options = parser("K–T frontiers on the tiny world.", STUDIES).parse_args()
    out = options.out
    if options.cells is not None:
        grid(with_second_base(STUDIES, out), out).work(options.cells, options.phase)
        return
    for studies in () if options.summarise else (lambda: STUDIES, lambda: with_second_base(STUDIES, out)):
        chosen = grid({n: study for n, study in studies().items() if not options.only or n in options.only}, out)
        for seed in options.seeds or (0, 1, 2):  # a whole seed at a time: an interrupted run still has whole seeds
            pending = [cell for cell in chosen.cells() if cell.seed == seed and not cell.finished(out)]
            if pending:
                chosen.run(pending, options.workers)

    everything = grid(with_second_base(STUDIES, out), out)
    points = everything.points()
    summary = summarise(points, everything.curves())
    print_tables(summary)
    setting = {"steps": STEPS, "save_steps": SAVE_STEPS, "batch_size": 32, "rank": 16}
    write_json(
        RESULTS,
        {"setting": setting, "cells": everything.finished(), "base": build().info}
        | {"studies": {name: vars(study) for name, study in everything.studies.items()}}
        | {"summary": summary, "points": points},
    )
    draw(points, FIGURE)
    print(f"\n{everything.finished()} cells; {RESULTS} and {FIGURE}")


if __name__ == "__main__":
    main()
