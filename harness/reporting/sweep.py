"""The result of a sweep: scores with their spread over seeds, tests against a baseline, the Pareto front, every run.

``sweep.md`` and ``sweep.html`` (one file that opens offline), ``table.csv`` (a row for each configuration),
``differences.csv`` (the tests), ``sweep.csv`` (a row for each run), ``pareto.png``.

Two tests answer two questions. Over seeds: would another seed have given the same order? Pairs are runs of one seed.
Over items: would other questions have? Pairs are the answers to one question, each the mean over the seeds that both
configurations have. Neither covers the other.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from harness.errors import UserError
from harness.evaluation.bootstrap import Cell as Scores
from harness.evaluation.intervals import QUANTITIES, Measured, differences
from harness.evaluation.items import ItemScores
from harness.evaluation.significance import MeanAndDeviation, PairedTest, holm, mean_and_deviation, paired_test
from harness.files import read_json, write_bytes, write_text
from harness.reporting import wording
from harness.reporting.answers import measured
from harness.reporting.figures import KTPath, KTPoint, on_front, pareto_figure
from harness.reporting.records import RunRecord, read_run
from harness.reporting.report import Figure, _environment
from harness.reporting.tables import Table, Value

LEVEL = 0.05
_TRAINING = {"loss": "training loss", "preserve_loss": "preserve loss", "preserve_accuracy": "preserve accuracy"}


@dataclass(frozen=True)
class SweepTable(Table):
    """A table whose CSV lies beside the report."""

    @property
    def file(self) -> str:
        return f"{self.name}.csv"


@dataclass(frozen=True)
class SweepCell:
    """One run: ``status`` is finished, unfinished or failed; ``record`` is there where it is finished."""

    name: str
    label: str
    seed: int
    status: str
    error: str | None
    overrides: Mapping[str, Any]
    run: Path
    record: RunRecord | None

    @property
    def values(self) -> dict[str, float]:
        """What was measured, by name: T, K, KT, Avg, tasks, and the last logged losses."""
        if self.record is None:
            return {}
        evaluation = self.record.evaluation
        final = evaluation.final if evaluation else None
        found: dict[str, float | None] = {}
        if evaluation is not None and final is not None:
            found = {name: getattr(final, name) for name in QUANTITIES}
            found |= {task: final.scores[task].value for task in evaluation.tasks if task in final.scores}
        found |= {name: self.record.last(name) for name in _TRAINING}
        return {name: value for name, value in found.items() if value is not None and np.isfinite(value)}


@dataclass(frozen=True)
class Configuration:
    """The finished runs of one label, which differ in the seed alone."""

    label: str
    cells: tuple[SweepCell, ...]
    planned: int

    def by_seed(self, name: str) -> dict[int, float]:
        """A value by seed, where it was measured."""
        return {cell.seed: cell.values[name] for cell in self.cells if name in cell.values}

    def spread(self, name: str) -> MeanAndDeviation | None:
        """Mean ± standard deviation over seeds; None where it was not measured."""
        values = list(self.by_seed(name).values())
        return mean_and_deviation(values) if values else None


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as its folder holds it."""

    folder: Path
    title: str
    baseline: str | None
    cells: tuple[SweepCell, ...]

    @property
    def configurations(self) -> tuple[Configuration, ...]:
        """By label, in the order of the sweep."""
        labels = dict.fromkeys(cell.label for cell in self.cells)
        return tuple(
            Configuration(
                label,
                tuple(cell for cell in self.cells if cell.label == label and cell.record is not None),
                sum(cell.label == label for cell in self.cells),
            )
            for label in labels
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that was measured in any run: T, K, KT, Avg, tasks, losses."""
        found = dict.fromkeys(name for cell in self.cells for name in cell.values)
        fixed = [name for name in QUANTITIES if name in found]
        logged = [name for name in _TRAINING if name in found]
        return (*fixed, *(name for name in found if name not in (*QUANTITIES, *_TRAINING)), *logged)

    @property
    def scores(self) -> tuple[str, ...]:
        """Those of them that are scores: higher is better."""
        return tuple(name for name in self.names if name not in _TRAINING)


@dataclass(frozen=True)
class Comparison:
    """How a configuration differs from the baseline in one score.

    ``over_seeds``: None with fewer than two common seeds. ``over_items``: None where items are not known, or the score
    is no sum over items (KT).
    """

    label: str
    name: str
    difference: float
    seeds: int
    over_seeds: PairedTest | None
    interval: tuple[float, float] | None
    over_items: float | None


def read_sweep(folder: Path) -> SweepRecord:
    """Read ``sweep.json`` and the run directories that it names.

    Raises:
        UserError: there is none, or a run cannot be read.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise UserError(f"sweep: {folder} has no sweep.json; give the folder of a sweep")
    content = read_json(path)
    cells = [
        SweepCell(
            name=cell["name"],
            label=cell["label"],
            seed=cell["seed"],
            status=cell["status"],
            error=cell["error"],
            overrides=cell["overrides"],
            run=folder / cell["run"],
            record=read_run(folder / cell["run"]) if cell["status"] == "finished" else None,
        )
        for cell in content["cells"]
    ]
    return SweepRecord(folder, content["title"], content["baseline"], tuple(cells))


def write_sweep(folder: Path) -> Path:
    """Write tables, figure and report into the sweep's folder; the path of the HTML.

    Raises:
        UserError: see `read_sweep`.
    """
    sweep = read_sweep(folder)
    compared = compare(sweep)
    tables = {
        "scores": scores_table(sweep),
        "against": comparison_table(compared, sweep.baseline or ""),
        "runs": runs_table(sweep),
    }
    for table in tables.values():
        if table is not None:
            write_text(folder / table.file, table.csv())
    if tables["against"] is None:
        (folder / "differences.csv").unlink(missing_ok=True)
    png, svg = (front_figure(sweep, kind) for kind in ("png", "svg"))
    if png is not None:
        write_bytes(folder / "pareto.png", png)
    else:
        (folder / "pareto.png").unlink(missing_ok=True)
    view = {
        "title": f"Sweep {sweep.title}",
        "subtitle": _subtitle(sweep),
        "sentences": _sentences(sweep, compared),
        "baseline": sweep.baseline,
        "t_meaning": _t_meaning(sweep),
        "figures": [Figure("K against T", svg.decode("utf-8"), _CAPTION, True)] if svg is not None else [],
        "untested": bool(compared) and all(one.over_items is None for one in compared),
        "failed": [(cell.name, cell.error) for cell in sweep.cells if cell.status == "failed"],
        "reports": _reports(sweep),
        **tables,
    }
    environment = _environment()
    for kind in ("md", "html"):  # the HTML last: where it is new, all are
        write_text(folder / f"sweep.{kind}", environment.get_template(f"sweep.{kind}.j2").render(view))
    return folder / "sweep.html"


def print_sweep(folder: Path) -> None:
    """Print the table of scores and where everything is, on standard output."""
    sweep = read_sweep(folder)
    console = Console(highlight=False, soft_wrap=True)
    names = [name for name in QUANTITIES[:3] if name in sweep.names] or sweep.names
    shown = RichTable(padding=(0, 0, 0, 1))
    shown.add_column(Text("configuration"), overflow="fold")
    for name in ("runs", *names):
        shown.add_column(Text(_TRAINING.get(name, name)), justify="right")
    for configuration in sweep.configurations:
        spreads = (_spread(configuration.spread(name)) for name in names)
        shown.add_row(Text(configuration.label), _count(configuration), *spreads)
    console.print(shown)
    for cell in sweep.cells:
        if cell.status == "failed":
            console.print(f"failed  {cell.name}: {cell.error}", markup=False)
    places = {"table": "sweep.md", "report": "sweep.html", "figure": "pareto.png", "every run": "sweep.csv"}
    for what, file in places.items():
        if (folder / file).is_file():
            console.print(f"{what:>9}  {(folder / file).resolve()}", markup=False)


# ---------------------------------------------------------------- numbers


def compare(sweep: SweepRecord) -> list[Comparison]:
    """Every configuration against the baseline, score by score, over the seeds that both have."""
    baseline = next((one for one in sweep.configurations if one.label == sweep.baseline), None)
    if baseline is None:
        return []
    found = []
    for configuration in sweep.configurations:
        if configuration.label == sweep.baseline:
            continue
        over_items = _over_items(configuration, baseline)
        for name in sweep.scores:
            a, b = configuration.by_seed(name), baseline.by_seed(name)
            seeds = sorted(a.keys() & b.keys())
            if not seeds:
                continue
            pairs = [a[seed] for seed in seeds], [b[seed] for seed in seeds]
            items = over_items.get(name)
            found.append(
                Comparison(
                    label=configuration.label,
                    name=name,
                    difference=float(np.mean(pairs[0]) - np.mean(pairs[1])),
                    seeds=len(seeds),
                    over_seeds=paired_test(*pairs) if len(seeds) > 1 else None,
                    interval=items.interval if items is not None else None,
                    over_items=items.p_value if items is not None else None,
                )
            )
    return found


def _over_items(a: Configuration, b: Configuration) -> Mapping[str, Any]:
    """`harness.evaluation.intervals.differences` of the two, each item's score being its mean over common seeds."""
    seeds = sorted({cell.seed for cell in a.cells} & {cell.seed for cell in b.cells})
    means = [mean_over_seeds([_measured(one, seed) for seed in seeds]) for one in (a, b)]
    return differences(means[0], means[1]) if seeds and means[0] is not None and means[1] is not None else {}


def _measured(configuration: Configuration, seed: int) -> Measured | None:
    record = next(cell.record for cell in configuration.cells if cell.seed == seed)
    return measured(record) if record is not None else None


def mean_over_seeds(runs: Sequence[Measured | None]) -> Measured | None:
    """One model whose every item has the mean score of ``runs``; None where one is not known, or tasks differ."""
    known = [run for run in runs if run is not None]
    if not known or len(known) < len(runs) or len({(run.knowledge, run.task) for run in known}) > 1:
        return None
    full = [run.full_fine_tuning for run in known if run.full_fine_tuning is not None]
    if len(full) not in (0, len(known)):
        return None
    return Measured(
        known[0].knowledge,
        known[0].task,
        _mean_scores([run.tuned for run in known]),
        _mean_scores([run.base for run in known]),
        _mean_scores(full) if full else None,
    )


def _mean_scores(runs: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    found: dict[str, Scores] = {}
    for task in runs[0]:
        scores = [run[task] for run in runs if task in run]
        items = [one for one in scores if isinstance(one, ItemScores)]
        if len(items) == len(runs) and len({one.ids for one in items}) == 1:
            found[task] = ItemScores(items[0].ids, np.mean([one.values for one in items], axis=0))
        else:
            found[task] = float(np.mean([one.mean if isinstance(one, ItemScores) else one for one in scores]))
    return found


# ---------------------------------------------------------------- tables and figure


def scores_table(sweep: SweepRecord) -> SweepTable:
    """A row for each configuration: mean ± standard deviation over seeds of everything that was measured."""
    configurations, names = sweep.configurations, sweep.names
    front = _front(configurations)
    rows, data = [], []
    for place, configuration in enumerate(configurations):
        spreads = {name: configuration.spread(name) for name in names}
        rows.append((configuration.label, _count(configuration), *(_spread(spreads[name]) for name in names)))
        values: dict[str, Value] = {
            "configuration": configuration.label,
            "runs": len(configuration.cells),
            "planned": configuration.planned,
            "on_pareto_front": front.get(place),
        }
        for name, spread in spreads.items():
            values |= {
                f"{name}_mean": spread.mean if spread else None,
                f"{name}_deviation": spread.deviation if spread else None,
                f"{name}_seeds": spread.count if spread else 0,
            }
        data.append(values)
    return SweepTable(
        headers=("configuration", "runs", *(_TRAINING.get(name, name) for name in names)),
        hints=("", "finished", *(_hint(sweep, name) for name in names)),
        rows=tuple(rows),
        name="table",
        strong=frozenset(place for place, leads in front.items() if leads),
        data=tuple(data),
    )


def comparison_table(compared: Sequence[Comparison], baseline: str) -> SweepTable | None:
    """A row for each configuration and score; Holm's adjustment is over all rows. None without a comparison."""
    if not compared:
        return None
    of_seeds = [one.over_seeds.p_value if one.over_seeds is not None else None for one in compared]
    seeds_holm, items_holm = holm(of_seeds), holm([one.over_items for one in compared])
    rows, data, strong = [], [], set()
    for place, one in enumerate(compared):
        test = one.over_seeds
        rows.append(
            (
                one.label,
                one.name,
                wording.signed(one.difference, 3),
                str(one.seeds),
                wording.probability(of_seeds[place]),
                wording.probability(test.smallest if test is not None else None),
                wording.interval(one.interval, 3, sign=True),
                wording.probability(one.over_items),
                wording.probability(items_holm[place]),
            )
        )
        if any(p is not None and p < LEVEL for p in (seeds_holm[place], items_holm[place])):
            strong.add(place)
        low, high = one.interval if one.interval is not None else (None, None)
        data.append(
            {
                "configuration": one.label,
                "baseline": baseline,
                "score": one.name,
                "difference": one.difference,
                "seeds": one.seeds,
                "p_seeds": of_seeds[place],
                "p_seeds_smallest_possible": test.smallest if test is not None else None,
                "p_seeds_holm": seeds_holm[place],
                "difference_low": low,
                "difference_high": high,
                "p_items": one.over_items,
                "p_items_holm": items_holm[place],
            }
        )
    return SweepTable(
        headers=("configuration", "of", "difference", "seeds", "p", "least p", "95 % interval", "p", "p, all rows"),
        hints=("", "", f"from {baseline}", "", "over seeds", "of so many", "over items", "over items", "Holm, items"),
        rows=tuple(rows),
        name="differences",
        strong=frozenset(strong),
        text=frozenset({0, 1}),
        data=tuple(data),
    )


def runs_table(sweep: SweepRecord) -> SweepTable:
    """A row for each run, in full precision in the CSV."""
    names = sweep.names
    keys = dict.fromkeys(key for cell in sweep.cells for key in cell.overrides)
    rows, data = [], []
    for cell in sweep.cells:
        values, record = cell.values, cell.record
        numbers = (wording.number(values.get(name), 3) for name in names)
        seconds = record.training_seconds if record else None
        rows.append((cell.name, cell.label, str(cell.seed), cell.status, *numbers, wording.number(seconds, 0)))
        data.append(
            {
                "run": cell.name,
                "configuration": cell.label,
                "seed": cell.seed,
                "status": cell.status,
                **{name: values.get(name) for name in names},
                "steps": record.steps if record else None,
                "training_seconds": seconds,
                **{f"config {key}": _plain(cell.overrides.get(key)) for key in keys},
                "folder": str(cell.run),
                "error": cell.error,
            }
        )
    return SweepTable(
        headers=("run", "configuration", "seed", "status", *(_TRAINING.get(n, n) for n in names), "training"),
        hints=("", "", "", "", *("" for _ in names), "seconds"),
        rows=tuple(rows),
        name="sweep",
        text=frozenset({0, 1, 3}),
        data=tuple(data),
    )


_CAPTION = (
    "Each point is a configuration: the mean over its seeds, with one standard deviation to each side. The dashed line "
    "joins the Pareto front (larger marks): no other configuration has at least as much K and T, and more of one.",
    "Right: more of the task learned. Up: more of the base's knowledge kept. Points whose bars overlap may change "
    "places with other seeds.",
)


def front_figure(sweep: SweepRecord, kind: Any) -> bytes | None:
    """K against T, means over seeds with standard deviations; None with fewer than two configurations that have both.

    ``kind``: png or svg.
    """
    placed = [(one.label, point) for one in sweep.configurations if (point := _point(one)) is not None]
    evaluations = [cell.record.evaluation for cell in sweep.cells if cell.record is not None]
    axes = {wording.t_axis(evaluation) for evaluation in evaluations if evaluation is not None}
    t_axis = axes.pop() if len(axes) == 1 else "task learned (references differ)"
    return pareto_figure([KTPath(label, (point,)) for label, point in placed], t_axis, kind)


def _front(configurations: Sequence[Configuration]) -> dict[int, bool]:
    """Place → whether it is on the Pareto front; only configurations that have K and T."""
    points = {place: point for place, one in enumerate(configurations) if (point := _point(one)) is not None}
    return dict(zip(points, on_front(list(points.values())), strict=True)) if len(points) > 1 else {}


def _point(configuration: Configuration) -> KTPoint | None:
    T, K = configuration.spread("T"), configuration.spread("K")
    if T is None or K is None:
        return None
    steps = max(cell.record.steps or 0 for cell in configuration.cells if cell.record is not None)
    return KTPoint(steps, T.mean, K.mean, _bar(T), _bar(K))


def _bar(spread: MeanAndDeviation) -> tuple[float, float] | None:
    if spread.deviation is None:
        return None
    return spread.mean - spread.deviation, spread.mean + spread.deviation


# ---------------------------------------------------------------- words


def _spread(spread: MeanAndDeviation | None) -> str:
    if spread is None:
        return wording.NOTHING
    return wording.number(spread.mean, 3) + (f" ± {spread.deviation:.3f}" if spread.deviation is not None else "")


def _count(configuration: Configuration) -> str:
    done = len(configuration.cells)
    return str(done) if done == configuration.planned else f"{done} of {configuration.planned}"


def _hint(sweep: SweepRecord, name: str) -> str:
    fixed = {"T": "learned", "K": "kept", "KT": "both", "Avg": "raw", **dict.fromkeys(_TRAINING, "last logged")}
    evaluations = [cell.record.evaluation for cell in sweep.cells if cell.record and cell.record.evaluation]
    return fixed.get(name) or ("knowledge" if any(name in one.knowledge for one in evaluations) else "task")


def _plain(value: Any) -> Value:
    is_plain = value is None or isinstance(value, str | int | float | bool)
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _t_meaning(sweep: SweepRecord) -> str | None:
    evaluations = [cell.record.evaluation for cell in sweep.cells if cell.record and cell.record.evaluation]
    meanings = {wording.t_meaning(evaluation) for evaluation in evaluations}
    return meanings.pop() if len(meanings) == 1 else None


def _subtitle(sweep: SweepRecord) -> str:
    configurations, seeds = len(sweep.configurations), len({cell.seed for cell in sweep.cells})
    return " · ".join(
        f"{count} {what}{'s' if count != 1 else ''}"
        for count, what in ((configurations, "configuration"), (seeds, "seed"), (len(sweep.cells), "run"))
    )


def _sentences(sweep: SweepRecord, compared: Sequence[Comparison]) -> list[str]:
    """What is not finished, and which configurations are on the front."""
    sentences = []
    counts = {status: sum(cell.status == status for cell in sweep.cells) for status in ("unfinished", "failed")}
    if counts["unfinished"]:
        sentences.append(
            f"{counts['unfinished']} of {len(sweep.cells)} runs are not finished: the numbers will change."
        )
    if counts["failed"]:
        sentences.append(f"{counts['failed']} of {len(sweep.cells)} runs failed and are left out.")
    configurations = sweep.configurations
    leading = [configurations[place].label for place, leads in _front(configurations).items() if leads]
    if leading:
        verb = "is" if len(leading) == 1 else "are"
        sentences.append(f"{wording.listing(leading)} {verb} on the Pareto front of K and T.")
    tests = [one.over_seeds for one in compared if one.over_seeds is not None]
    if tests and min(test.smallest for test in tests) > LEVEL:
        few = max(test.pairs for test in tests)
        sentences.append(f"With {few} seeds no test over seeds can fall below {2 / 2**few:g}: six are needed for 0.05.")
    return sentences


def _reports(sweep: SweepRecord) -> list[tuple[str, str]]:
    """Name and relative link of every finished run's own report."""
    pages = [(cell.name, cell.run / "report.html") for cell in sweep.cells]
    return [
        (name, quote(Path(os.path.relpath(page, sweep.folder)).as_posix())) for name, page in pages if page.is_file()
    ]
