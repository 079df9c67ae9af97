"""What the cells of `tiny_frontier` say: K at matched T, the claims, and the figure.

Methods are compared by K at matched T: per seed, the upper frontier of all (T, K) points of all rates and checkpoints,
interpolated linearly; then mean ± standard deviation over the seeds that reached that T.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MATCHED_T = (0.5, 0.8, 0.9, 0.95)
Point = dict[str, Any]


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (T, K) points that no other point beats on both axes, T ascending."""
    best: list[tuple[float, float]] = []
    for t, k in sorted(points, reverse=True):
        if not best or k > best[-1][1]:
            best.append((t, k))
    return best[::-1]


def k_at(front: list[tuple[float, float]], t: float) -> float | None:
    """K on the frontier at T = t, interpolated linearly; None where the method never got that far."""
    if not front or t > front[-1][0]:
        return None
    for (t0, k0), (t1, k1) in itertools.pairwise(front):
        if t0 <= t <= t1:
            return k0 + (k1 - k0) * (t - t0) / (t1 - t0)
    return front[0][1]


def matched(points: Sequence[Point], method: str, t: float) -> dict[int, float]:
    """K of ``method`` at T = t by seed, for the seeds that reached it."""
    found = {}
    for seed in sorted({p["seed"] for p in points if p["method"] == method}):
        value = k_at(frontier([(p["T"], p["K"]) for p in points if p["method"] == method and p["seed"] == seed]), t)
        if value is not None:
            found[seed] = value
    return found


def best_methods(points: Sequence[Point], count: int = 3) -> list[str]:
    """The ``count`` adapter methods with the highest mean K at T = 0.9, over methods of which every seed got there."""
    scores = {}
    for method in dict.fromkeys(p["method"] for p in points if p["method"] != "full"):
        seeds = {p["seed"] for p in points if p["method"] == method}
        values = matched(points, method, 0.9)
        if len(values) == len(seeds):
            scores[method] = statistics.mean(values.values())
    return sorted(scores, key=lambda name: -scores[name])[:count]


def summarise(points: Sequence[Point], curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per method K at matched T and the end points of its rates; then the claims."""
    claims = {
        "K at matched T, CorDA-KPM minus LoRA": differences(points, "CorDA-KPM", "LoRA"),
        "K at matched T, CorDA++-KPM minus CorDA-KPM": differences(points, "CorDA++-KPM", "CorDA-KPM"),
        "K at matched T, CorDA++-KPM + anchor minus CorDA-KPM + anchor": differences(
            points, "CorDA++-KPM + anchor", "CorDA-KPM + anchor"
        ),
        "K at matched T, CorDA++-IPM minus CorDA-IPM": differences(points, "CorDA++-IPM", "CorDA-IPM"),
        "K at matched T, FARSS minus LoRA": differences(points, "FARSS", "LoRA"),
        **{
            f"steps to LoRA's final training loss, {method}": steps_to_loss(curves, method, "LoRA")
            for method in ("CorDA-IPM", "CorDA++-IPM", "PiSSA", "CorDA-KPM", "FARSS", "full")
        },
    }
    return {"methods": summarise_methods(points), "claims": claims}


def summarise_methods(points: Sequence[Point]) -> dict[str, Any]:
    """Per method K at matched T and the end points of its rates."""
    methods = {}
    for method in dict.fromkeys(p["method"] for p in points):
        seeds = {p["seed"] for p in points if p["method"] == method}
        rows = {str(t): moments(list(matched(points, method, t).values()), len(seeds)) for t in MATCHED_T}
        methods[method] = {"K_at_T": rows, "end_points": _end_points(points, method)}
    return methods


def differences(points: Sequence[Point], one: str, other: str) -> dict[str, Any]:
    """K of ``one`` minus K of ``other`` at each matched T, paired by seed."""
    seeds = len(set.intersection(*({p["seed"] for p in points if p["method"] == name} for name in (one, other))))
    rows = {}
    for t in MATCHED_T:
        left, right = matched(points, one, t), matched(points, other, t)
        rows[str(t)] = moments([left[s] - right[s] for s in sorted(left.keys() & right.keys())], seeds)
    return rows


def steps_to_loss(curves: Sequence[dict[str, Any]], method: str, reference: str) -> list[dict[str, Any]]:
    """Per seed: the first step at which ``method`` is at the final training loss of ``reference``, best rates of both.

    Losses are means over the last 60 steps (three logged values).
    """
    rows = []
    for seed in sorted({c["seed"] for c in curves if c["method"] == method}):
        of = {
            name: [_smoothed(c["losses"]) for c in curves if c["method"] == name and c["seed"] == seed]
            for name in (method, reference)
        }
        if not of[reference]:
            continue
        best = min(of[reference], key=lambda curve: curve[-1][1])
        target, last = best[-1][1], best[-1][0]
        reached = [step for curve in of[method] for step, loss in curve if loss <= target]
        own = next(step for step, loss in best if loss <= target)
        rows.append(
            {"seed": seed, "loss": target, "steps": min(reached, default=None), "reference_steps": own, "of": last}
        )
    return rows


def _smoothed(losses: list[list[float]]) -> list[tuple[int, float]]:
    return [
        (int(losses[i][0]), statistics.mean(value for _, value in losses[i - 2 : i + 1])) for i in range(2, len(losses))
    ]


def moments(values: list[float], seeds: int) -> dict[str, Any]:
    """Mean and standard deviation over ``values``, out of how many ``seeds``."""
    return {
        "reached": len(values),
        "seeds": seeds,
        "mean": statistics.mean(values) if values else None,
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def _end_points(points: Sequence[Point], method: str) -> list[dict[str, Any]]:
    last = max(p["step"] for p in points)
    ends = []
    for rate in sorted({p["rate"] for p in points if p["method"] == method}):
        mine = [p for p in points if p["method"] == method and p["rate"] == rate and p["step"] == last]
        ends.append(
            {"rate": rate, "T": moments([p["T"] for p in mine], len(mine))}
            | {"K": moments([p["K"] for p in mine], len(mine))}
        )
    return ends


def print_tables(summary: dict[str, Any]) -> None:
    """K at matched T, where each rate ended, and the claims, as Markdown."""
    print_methods(summary["methods"])
    print("\nClaims\n")
    for claim, content in summary["claims"].items():
        if claim.startswith("K at"):
            text = ", ".join(f"T={t}: {cell(row)}" for t, row in content.items())
        else:
            text = ", ".join(f"seed {r['seed']}: {r['steps']} (LoRA {r['reference_steps']})" for r in content)
        print(f"- {claim}: {text}")


def print_methods(methods: dict[str, Any]) -> None:
    """K at matched T and where each rate ended, as Markdown."""
    print("\nK at matched T: mean ± standard deviation (seeds that reached that T / seeds run)\n")
    print("| method | " + " | ".join(f"T = {t}" for t in MATCHED_T) + " |")
    print("|---|" + "---|" * len(MATCHED_T))
    for method, entry in methods.items():
        print(f"| {method} | " + " | ".join(cell(entry["K_at_T"][str(t)]) for t in MATCHED_T) + " |")
    print("\nAt the last step, T / K\n")
    for method, entry in methods.items():
        ends = "; ".join(f"lr {end['rate']:g}: {_pm(end['T'])} / {_pm(end['K'])}" for end in entry["end_points"])
        print(f"- {method}: {ends}")


def cell(row: dict[str, Any]) -> str:
    """A table's cell: mean ± standard deviation (seeds that got there / seeds run)."""
    return "not reached" if row["mean"] is None else f"{_pm(row)} ({row['reached']}/{row['seeds']})"


def _pm(row: dict[str, Any]) -> str:
    spread = row["standard_deviation"]
    return f"{row['mean']:.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def draw(points: Sequence[Point], path: Path) -> None:
    """Mean frontiers with a band of one standard deviation: without the anchor, with it, quantised, second base."""
    names = list(dict.fromkeys(p["method"] for p in points))
    second = [n for n in names if n.endswith("(second base)")]
    quantised = [n for n in names if (n.startswith("Q") or n == "LoftQ") and n not in second]
    anchored = [n for n in names if "anchor" in n and n not in second]
    plain = [n for n in names if n not in {*quantised, *second, *anchored}]
    panels = {"initialisation alone": plain, "with the anchor": [*anchored, "LoRA"], "NF4 base": quantised}
    draw_panels(points, panels | {"second base": second}, path)


def draw_panels(points: Sequence[Point], panels: dict[str, list[str]], path: Path) -> None:
    """One panel for each title and its methods, two in a row, those without methods left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {title: methods for title, methods in panels.items() if methods}
    rows = -(-len(panels) // 2)
    figure, grid = plt.subplots(
        rows, 2, figsize=(13, 4.75 * rows), constrained_layout=True, sharex=True, sharey=True, squeeze=False
    )
    colours = plt.get_cmap("tab10").colors
    for axes, (title, methods) in zip(grid.flat, panels.items(), strict=False):
        for number, method in enumerate(methods):
            _draw_method(axes, points, method, colours[number % 10], "-" if number < 10 else "--")
        axes.set(title=title, xlim=(-0.02, 1.02), ylim=(-0.02, 1.06))
        axes.grid(alpha=0.25)
        columns = 4 if max(map(len, methods)) < 22 else 2  # a legend wider than its panel would make the panel narrow
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=columns, fontsize=8, frameon=False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("T: exact match on the new skill")
    figure.supylabel("K: share of the base's knowledge that is left")
    figure.suptitle("Tiny world: what each method can keep at what it has learned")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_method(axes: Any, points: Sequence[Point], method: str, colour: Any, line: str) -> None:
    import numpy as np

    mine = [p for p in points if p["method"] == method]
    if not mine:
        return
    axes.scatter([p["T"] for p in mine], [p["K"] for p in mine], s=9, color=colour, alpha=0.35, linewidths=0)
    steps = np.linspace(0, 1, 101)
    curves = []
    for seed in sorted({p["seed"] for p in mine}):
        front = frontier([(p["T"], p["K"]) for p in mine if p["seed"] == seed])
        curves.append([np.nan if (k := k_at(front, t)) is None else k for t in steps])
    stack = np.array(curves)
    reached = ~np.isnan(stack).any(axis=0)  # only where every seed got there: a mean over fewer would jump
    mean, spread = stack[:, reached].mean(axis=0), stack[:, reached].std(axis=0)
    axes.plot(steps[reached], mean, color=colour, label=method, linewidth=2, linestyle=line)
    axes.fill_between(steps[reached], mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
