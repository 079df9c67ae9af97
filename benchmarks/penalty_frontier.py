"""K–T frontiers of forms and penalties on the tiny world: what bounds, holds, replays or anchors an update.

    .venv/bin/python benchmarks/penalty_frontier.py               about two hours on two cores; resumable
    .venv/bin/python benchmarks/penalty_frontier.py --only FCLoRA --seeds 0
    .venv/bin/python benchmarks/penalty_frontier.py --summarise   tables, JSON and figure from the finished cells

Every checkpoint of every rate counts, and methods are compared by K at matched T, as in `tiny_frontier`, whose runs of
LoRA, CorDA-KPM and the plain anchor are found again where ``--out`` is the same folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frontier_grid import SAVE_STEPS, STEPS, Grid, Point, Study, parser
from frontier_summary import MATCHED_T, cell, differences, draw_panels, moments, print_methods, summarise_methods

from harness.adapters.lora import read_adapter
from harness.decomposition.factors import factored_svd
from harness.files import write_json
from harness.tiny import build

RESULTS = Path(__file__).parent / "results" / "penalty_frontier.json"
FIGURE = Path(__file__).parent / "results" / "penalty_frontier.png"

LORA = "method={name: lora, rank: 16}"
KPM = "method={name: corda, mode: kpm, rank: 16}"
ANCHOR = "anchor={kl: 1.0, prompts_per_step: 4}"
TWO_RATES = (1.0e-3, 2.0e-3)
LAMBDAS = (1e2, 1e3, 1e4, 1e5, 1e6)  # those of the paper (Appendix D)


def lalora(strength: float, curvature: str = "diag") -> str:
    """The Laplace penalty as an override."""
    return f"penalties=[{{name: lalora, lambda: {strength}, curvature: {curvature}}}]"


def replay(ratio: float) -> str:
    """Replay of preserve prompts with the base's own answers, as an override."""
    return f"data.replay={{ratio: {ratio}, answers: true}}"


def two(*overrides: str, rates: tuple[float, ...] = TWO_RATES) -> Study:
    """Two rates, two seeds."""
    return Study(overrides, rates, (0, 1))


def once(*overrides: str) -> Study:
    """One rate, one seed: a combination that is only looked at."""
    return Study(overrides, (1.0e-3,), (0,))


MIGU = "penalties=[{name: migu, threshold: 0.7}]"
MIDDLE = LAMBDAS[len(LAMBDAS) // 2]
STUDIES: dict[str, Study] = {
    "LoRA": Study((LORA,), TWO_RATES),
    "FCLoRA": Study(("method={name: fclora, rank: 16}",), TWO_RATES),
    **{f"LALoRA-DIAG λ={strength:g}": Study((LORA, lalora(strength)), TWO_RATES) for strength in LAMBDAS},
    **{f"replay {ratio:.0%}": Study((LORA, replay(ratio)), TWO_RATES) for ratio in (0.01, 0.05, 0.2)},
    "LoRA + anchor": Study((LORA, ANCHOR), TWO_RATES),  # strength 1, 4 prompts a step, all 560 prompts
    **{
        f"anchor {strength:g}": Study((LORA, f"anchor={{kl: {strength}, prompts_per_step: 4}}"), TWO_RATES)
        for strength in (0.1, 10.0)
    },
    **{
        f"anchor, {count} a step": Study((LORA, f"anchor={{kl: 1.0, prompts_per_step: {count}}}"), TWO_RATES)
        for count in (1, 16)
    },
    **{
        f"anchor, {count} prompts": Study(
            (LORA, f"anchor={{kl: 1.0, prompts_per_step: 4, prompts: {count}}}"), TWO_RATES
        )
        for count in (32, 128)
    },
    "KaSA": two("method={name: kasa, rank: 16}"),
    "SORSA": two("method={name: sorsa, rank: 16}", rates=(3.0e-4, 1.0e-3)),
    "LALoRA-K-FAC": two(LORA, lalora(MIDDLE, "kfac")),
    "LALoRA-TRI-K-FAC": two(LORA, lalora(MIDDLE, "kfac_tri")),
    "MIGU": two(LORA, MIGU),
    "FLoRA": two("method={name: flora, rank: 16}"),
    "CorDA-KPM": Study((KPM,), (1.0e-3,), (0,)),
    "CorDA-KPM, LALoRA-DIAG": once(KPM, lalora(MIDDLE)),
    "CorDA-KPM, LALoRA-K-FAC": once(KPM, lalora(MIDDLE, "kfac")),
    "CorDA-KPM, LALoRA-TRI-K-FAC": once(KPM, lalora(MIDDLE, "kfac_tri")),
    "CorDA-KPM, MIGU": once(KPM, MIGU),
    "CorDA-KPM, replay 5%": once(KPM, replay(0.05)),
    "CorDA-KPM + anchor": Study((KPM, ANCHOR), (1.0e-3,), (0,)),
    "LALoRA-DIAG + anchor": once(LORA, lalora(MIDDLE), ANCHOR),
    "LALoRA-K-FAC + anchor": once(LORA, lalora(MIDDLE, "kfac"), ANCHOR),
    "LALoRA-TRI-K-FAC + anchor": once(LORA, lalora(MIDDLE, "kfac_tri"), ANCHOR),
    "MIGU + anchor": once(LORA, MIGU, ANCHOR),
    "replay 5% + anchor": once(LORA, replay(0.05), ANCHOR),
    "FCLoRA + anchor": once("method={name: fclora, rank: 16}", ANCHOR),
    "FLoRA + anchor": once("method={name: flora, rank: 16}", ANCHOR),
}


def spectral_norms(grid: Grid, methods: Sequence[str]) -> list[Point]:
    """σ₁ of every layer's ΔW at every checkpoint of the finished cells of ``methods``: mean and maximum over layers."""
    rows = []
    for own in grid.cells():
        if own.method not in methods or not own.finished(grid.out):
            continue
        run = grid.out / own.name
        for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS):
            folder = run / "adapter" if step == STEPS else run / "checkpoints" / f"step-{step}" / "adapter"
            norms = [factored_svd(f.B, f.A, f.scaling).spectral_norm for f in read_adapter(folder).values()]
            rows.append(
                {"method": own.method, "rate": own.rate, "seed": own.seed, "step": step}
                | {"mean": sum(norms) / len(norms), "max": max(norms)}
            )
    return rows


def claims(points: Sequence[Point], norms: Sequence[Point]) -> dict[str, Any]:
    """What was to be checked, as numbers."""

    def compared(one: str, other: str) -> dict[str, Any]:
        """FCLoRA beside LoRA at each step of the same rate and seed."""
        result = {}
        for name, source, key in (("spectral norm, mean over layers", norms, "mean"), ("K", points, "K")):
            by = {(p["method"], p["rate"], p["seed"], p["step"]): p[key] for p in source}
            pairs = [(by[one, *rest], by[other, *rest]) for m, *rest in by if m == one and (other, *rest) in by]
            ratios = [left / right if key == "mean" else left - right for left, right in pairs]
            result[name] = {
                "of": len(pairs),
                "below" if key == "mean" else "above": sum((a < b) if key == "mean" else (a > b) for a, b in pairs),
                "ratio" if key == "mean" else "difference": moments(ratios, len(ratios)),
            }
        return result

    diag = [name for name in STUDIES if name.startswith("LALoRA-DIAG λ")]
    # λ's front takes the best of five strengths, so LoRA's own front is what it must beat, seed by seed.
    front = [{**p, "method": "LALoRA-DIAG, all λ"} for p in points if p["method"] in diag]
    together = [*points, *front]
    return {
        "FCLoRA beside LoRA, same rate, seed and step": compared("FCLoRA", "LoRA"),
        **{
            f"K at matched T, {name} minus LoRA": differences(together, name, "LoRA")
            for name in ("LALoRA-DIAG, all λ", *STUDIES)
            if name != "LoRA" and len({p["seed"] for p in together if p["method"] == name}) > 1
        },
    }


def print_claims(found: dict[str, Any]) -> None:
    """The claims as a list."""
    print("\nClaims\n")
    for claim, content in found.items():
        if claim.startswith("K at"):
            reached = {t: row for t, row in content.items() if row["reached"]}
            if reached:
                print(f"- {claim}: " + ", ".join(f"T={t}: {cell(row)}" for t, row in reached.items()))
            continue
        for what, row in content.items():
            word = "below" if "below" in row else "above"
            moment = row.get("ratio") or row["difference"]
            kind = "ratio" if "ratio" in row else "difference"
            print(f"- {claim}: {what} {word} in {row[word]} of {row['of']}, {kind} {cell(moment)}")


def panels() -> dict[str, list[str]]:
    """Which methods stand together in the figure."""
    names = list(STUDIES)
    return {
        "form of the update": ["LoRA", "FCLoRA", "KaSA", "SORSA", "FLoRA"],
        "Laplace penalty, MIGU": [
            "LoRA",
            *(n for n in names if n.startswith(("LALoRA-DIAG λ", "LALoRA-K", "LALoRA-T")) and "anchor" not in n),
            "MIGU",
        ],
        "replay and the anchor's strength": [
            "LoRA",
            *(n for n in names if n.startswith("replay") and "anchor" not in n),
            "LoRA + anchor",
            "anchor 0.1",
            "anchor 10",
        ],
        "the anchor's prompts": ["LoRA", "LoRA + anchor", *(n for n in names if n.startswith("anchor,"))],
        "over CorDA-KPM (one seed)": [n for n in names if n.startswith("CorDA-KPM") and "anchor" not in n],
        "with the anchor (one seed)": [
            "LoRA + anchor",
            *(n for n in names if n.endswith(" + anchor") and n != "LoRA + anchor"),
        ],
    }


def main() -> None:
    """Run what is missing, then summarise."""
    options = parser("K–T frontiers of forms and penalties on the tiny world.", STUDIES).parse_args()
    everything = Grid(STUDIES, options.out, Path(__file__))
    if options.cells is not None:
        everything.work(options.cells, options.phase)
        return
    if not options.summarise:
        chosen = Grid(
            {name: study for name, study in STUDIES.items() if not options.only or name in options.only},
            options.out,
            Path(__file__),
        )
        for seed in options.seeds or (0, 1, 2):
            pending = [own for own in chosen.cells() if own.seed == seed and not own.finished(options.out)]
            if pending:
                chosen.run(pending, options.workers)

    points = everything.points()
    norms = spectral_norms(everything, ("LoRA", "FCLoRA"))
    methods, found = summarise_methods(points), claims(points, norms)
    print_methods(methods)
    print_claims(found)
    setting = {"steps": STEPS, "save_steps": SAVE_STEPS, "batch_size": 32, "rank": 16, "matched_T": MATCHED_T}
    write_json(
        RESULTS,
        {"setting": setting, "cells": everything.finished(), "base": build().info}
        | {"studies": {name: vars(study) for name, study in STUDIES.items()}}
        | {"summary": {"methods": methods, "claims": found}, "points": points, "spectral_norms": norms},
    )
    draw_panels(points, panels(), FIGURE)
    print(f"\n{everything.finished()} cells; {RESULTS} and {FIGURE}")


if __name__ == "__main__":
    main()
