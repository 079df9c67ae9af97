"""Reports of one run and of several side by side (``report.md``, ``report.html``), and the terminal's table.

The HTML is one file: styles and figures are inside, nothing is fetched, no script runs. The Markdown carries
the same tables and sentences and refers to the HTML for the figures, so that neither file can be half of a
pair that is out of step: each is written atomically, ``report.html`` last. Every table is also a CSV file in
``tables/`` beside them.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from harness.errors import UserError
from harness.files import read_json, write_text
from harness.reporting import figures, wording
from harness.reporting.answers import NOT_KEPT, changed_answers, changes_table, read_changes, shown_examples
from harness.reporting.baseline import baseline_table, find_baseline
from harness.reporting.records import (
    ALL,
    DIAGNOSTICS,
    EvaluatedModel,
    Evaluation,
    Initialisation,
    RunRecord,
    Score,
    read_run,
)
from harness.reporting.tables import Table, Value, bounds, write_tables

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from rich.table import Table as RichTable

# What vLLM's --max-lora-rank takes.
_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_TERMINAL_COLUMNS = ("run", "T", "K", "KT", "best KT", "learning rate", "steps", "training")
_PLANE, _RANKS, _FRONT = "The K–T plane", "Rank by layer", "K against T at the ends"
_WIDE = (_PLANE, _RANKS)
_BOUNDED = ("T", "K", "KT", "Avg")
_QUANTITY_HEADERS = ("T", "K", "KT", "Avg.")
_PLANE_AXES = (
    "Right: more of the task learned. Up: more of the base's knowledge kept. The best place is the upper right.",
    "Grey lines join points of equal KT. The learning rate and the stopping time decide how far along its "
    "path a run goes.",
)


_DIAGNOSTICS_CAPTION = (
    "W→ΔW: how much of what W has in the directions of ΔW was amplified. ΔW→W: large where ΔW lies outside the leading "
    "directions of W. Neither is defined while ΔW is zero.",
)


@dataclass(frozen=True)
class Figure:
    """A figure and how to read it; a ``wide`` one takes a whole row on a desk, with the text beside it."""

    title: str
    svg: str
    caption: tuple[str, ...]
    wide: bool


@dataclass(frozen=True)
class Snippet:
    """Lines to copy, and what they are for."""

    title: str
    language: str
    code: str


def write_report(run: Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``tables/`` into the run directory ``run``; return the HTML's path.

    Parts that have not been run say so.

    Raises:
        UserError: ``run`` is not a run directory, or one of its files cannot be read.
    """
    return _write(Path(run), "report", _run_view(read_run(run)))


def write_comparison(
    runs: Sequence[Path], folder: Path, title: str = "Comparison of runs", baseline: str | None = None
) -> Path:
    """Write a comparison of ``runs`` into ``folder``, as a run's report is; return the path of the HTML.

    Args:
        baseline: the run that the others are tested against, by its name, its folder's or its path; None: the first.

    Raises:
        UserError: there are no runs, one of them cannot be read, or none is the baseline.
    """
    records = _read_runs(runs)
    labels = _labels(records)
    view = _comparison_view(records, labels, Path(folder), title, find_baseline(records, labels, baseline))
    return _write(Path(folder), "comparison", view)


def summary_table(runs: Sequence[Path]) -> "RichTable":
    """The comparison's table for a terminal of 80 columns: scores and settings; the reports have every task.

    Raises:
        UserError: there are no runs, or one of them cannot be read.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    records = _read_runs(runs)
    table = _comparison_table(records, _labels(records), with_intervals=False)
    shown = RichTable(padding=(0, 0, 0, 1))
    columns = [table.headers.index(header) for header in _TERMINAL_COLUMNS]
    for column in columns:
        # Text, not str: a run called "[red]" is not markup.
        header = Text("\n".join(filter(None, (table.headers[column], table.hint(column)))))
        words = column in table.text
        shown.add_column(header, justify="left" if words else "right", no_wrap=words, overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(row[column]) for column in columns))
    return shown


def _read_runs(runs: Sequence[Path]) -> list[RunRecord]:
    if not runs:
        raise UserError("runs: none given; give at least one run directory")
    return [read_run(run) for run in runs]


# ---------------------------------------------------------------- one run


def _run_view(record: RunRecord) -> dict[str, Any]:
    evaluation, initialisation = record.evaluation, record.initialisation
    changes = read_changes(record)
    return {
        "title": record.name,
        "subtitle": _subtitle(record),
        "summary": wording.summary(record),
        "tiles": _tiles(record),
        "scores": _score_table(evaluation) if evaluation else None,
        "t_meaning": wording.t_meaning(evaluation) if evaluation else None,
        "engine": evaluation.engine if evaluation else None,
        "intervals": evaluation is not None and evaluation.has_intervals,
        "not_kept": NOT_KEPT if evaluation and not (evaluation.has_intervals or changes) else None,
        "changes": changes_table(evaluation, changes) if evaluation else None,
        "examples": shown_examples(changes),
        "changed_answers": changed_answers(changes),
        "trained": bool(record.metrics or (evaluation and evaluation.final)),
        "figures": _run_figures(record),
        "diagnostics": _diagnostics_table(record),
        "initialisation": _initialisation_facts(initialisation) if initialisation else None,
        "layers": _layer_table(initialisation) if initialisation and initialisation.layers else None,
        "places": _places(record.path),
        "snippets": _snippets(record),
        "advice": wording.advice(record),
        "config": _yaml(record.config) if record.config else None,
        "facts": list(_flat(record.environment).items()) if record.environment else None,
        "notes": _notes(record),
    }


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _subtitle(record: RunRecord) -> str:
    method, rank, base = wording.method(record), record.setting("method.rank"), record.setting("model.path")
    parts = [method] if method != wording.NOTHING else []
    parts += [f"rank {rank}"] if rank else []
    parts += [f"anchor {wording.anchor(record)}"] if record.setting("anchor.kl") is not None else []
    parts += [f"on {base}"] if base else []
    return " · ".join(parts)


def _notes(record: RunRecord) -> list[str]:
    """What the reader met and what the evaluation noted, without what ``t_meaning`` says already."""
    noted = record.evaluation.notes if record.evaluation else ()
    return [*record.notes, *(note for note in noted if "eval.full_fine_tuning" not in note)]


def _tiles(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """Letter, value, interval (or nothing), meaning."""
    final = record.evaluation.final if record.evaluation else None
    if record.evaluation is None or final is None:
        return []
    learned = "learned: " + wording.t_axis(record.evaluation)
    kept = "kept: knowledge scores ÷ the base's"
    meanings = {"T": learned, "K": kept, "KT": "both: harmonic mean of T and K", "Avg": "mean of all raw scores"}
    return [
        (
            "Avg." if name == "Avg" else name,
            wording.number(getattr(final, name)),
            wording.interval(final.intervals[name]) if name in final.intervals else "",
            meaning,
        )
        for name, meaning in meanings.items()
    ]


def _score_table(evaluation: Evaluation) -> Table:
    kinds = {name: "knowledge" for name in evaluation.knowledge} | {name: "task" for name in evaluation.task}
    rows = tuple(
        (
            model.name,
            *(wording.quantity(model, name) for name in _BOUNDED),
            *(wording.score(model.scores.get(task)) for task in evaluation.tasks),
            wording.number(model.samples_per_second, 1 if (model.samples_per_second or 0) < 10 else 0),
        )
        for model in evaluation.models
    )
    return Table(
        headers=("model", "T", "K", "KT", "Avg.", *evaluation.tasks, "samples/s"),
        hints=("", "learned", "kept", "both", "raw", *(kinds[task] for task in evaluation.tasks), "evaluation"),
        rows=rows,
        name="scores",
        data=tuple(
            {
                "model": model.name,
                "step": 0 if model.name == "base" else model.step,
                **_model_columns(model, evaluation.tasks),
                "seconds": model.seconds,
                "samples_per_second": model.samples_per_second,
            }
            for model in evaluation.models
        ),
        strong=frozenset(index for index, model in enumerate(evaluation.models) if model.name == "final"),
    )


def _model_columns(model: EvaluatedModel | None, tasks: Sequence[str]) -> dict[str, Value]:
    """Quantities with their intervals, and every task's score, standard error and number of items."""
    columns: dict[str, Value] = {}
    for name in _BOUNDED:
        columns[name] = getattr(model, name) if model else None
        columns |= bounds(name, model.intervals.get(name) if model else None)
    for task in tasks:
        score: Score | None = model.scores.get(task) if model else None
        columns[task] = score.value if score else None
        columns[f"{task}_stderr"] = score.stderr if score else None
        columns[f"{task}_items"] = score.items if score else None
    return columns


def _run_figures(record: RunRecord) -> list[Figure]:
    path = figures.kt_path(record)
    spread = [f"Ranks: {record.initialisation.spread}."] if record.initialisation else []
    drawn = [
        (
            _PLANE,
            figures.kt_figure([path], wording.t_axis(record.evaluation)) if path else None,
            (
                "The way of this run: from the base (star) through the evaluated checkpoints (small marks) "
                "to the end (large mark). Numbers are optimiser steps.",
                *_PLANE_AXES,
            ),
        ),
        (
            "Forgetting",
            figures.forgetting_figure([record]),
            (
                "Forgetting as it happens: a rising preserve loss, a falling K. The dashed line is the base (K = 1).",
                *_bands([record]),
            ),
        ),
        (
            "Training loss",
            figures.loss_figure([record]),
            (
                "What the optimiser saw; penalties stand in panels of their own. Long curves are means of "
                "neighbouring points, with a band from the smallest to the largest.",
            ),
        ),
        (
            "Diagnostics",
            figures.diagnostics_figure(record),
            (
                "The exact update ΔW of the original weights, means over the layers of each module type.",
                *_DIAGNOSTICS_CAPTION,
            ),
        ),
        (
            _RANKS,
            figures.rank_figure(record.initialisation.layers) if record.initialisation else None,
            (
                "Where the method put the parameters: modules by block, from the input (left) to the output.",
                *spread,
            ),
        ),
    ]
    return _figures(drawn)


def _diagnostics_table(record: RunRecord) -> Table | None:
    """The last values by module type; None where diagnostics were not logged."""
    measured = [quantity for quantity in DIAGNOSTICS if record.last(f"{quantity}/{ALL}") is not None]
    if not measured:
        return None
    types = sorted({name for quantity in measured for name in record.module_types(quantity)})
    rows = tuple(
        (name, *(wording.significant(record.last(f"{quantity}/{name}")) for quantity in measured))
        for name in (*types, ALL)
    )
    data = tuple(
        {"layers": name} | {quantity: record.last(f"{quantity}/{name}") for quantity in measured}
        for name in (*types, ALL)
    )
    headers = ("layers", *(figures.DIAGNOSTIC_NAMES[quantity] for quantity in measured))
    return Table(headers, rows, name="diagnostics", data=data)


def _diagnostics_comparison(records: Sequence[RunRecord], labels: Sequence[str]) -> Table | None:
    """The last values of each run, over all layers; None where no run has any."""
    keys = {f"{quantity}/{ALL}": figures.DIAGNOSTIC_NAMES[quantity] for quantity in DIAGNOSTICS}
    measured = [key for key in keys if any(record.last(key) is not None for record in records)]
    if not measured:
        return None
    rows = tuple(
        (label, *(wording.significant(record.last(key)) for key in measured))
        for record, label in zip(records, labels, strict=True)
    )
    data = tuple(
        {"run": label} | {key.partition("/")[0]: record.last(key) for key in measured}
        for record, label in zip(records, labels, strict=True)
    )
    return Table(("run", *(keys[key] for key in measured)), rows, name="diagnostics", data=data)


def _figures(drawn: Sequence[tuple[str, bytes | None, tuple[str, ...]]]) -> list[Figure]:
    return [Figure(title, svg.decode("utf-8"), caption, title in _WIDE) for title, svg, caption in drawn if svg]


def _initialisation_facts(initialisation: Initialisation) -> list[tuple[str, str]]:
    """Names and values: layers, ranks, parameters, and the spread of each of the method's own numbers."""
    layers = initialisation.layers
    facts = [("method", initialisation.method), ("layers", f"{len(layers):,}")]
    if initialisation.ranks:
        facts.append(("rank", initialisation.spread))
    if initialisation.adapter_parameters:
        share = 100 * initialisation.adapter_parameters / initialisation.layer_parameters
        count = f"{initialisation.adapter_parameters:,}"
        facts.append(("adapter parameters", f"{count} ({share:.2g} % of the adapted weights')"))
    for key in dict.fromkeys(key for layer in layers for key in layer.values):
        values = sorted(layer.values[key] for layer in layers if key in layer.values)
        low, middle, high = map(wording.significant, (values[0], values[len(values) // 2], values[-1]))
        largest = next(layer.name for layer in layers if layer.values.get(key) == values[-1])
        spread = f"median {middle}, from {low} to {high} (largest in {largest})"
        facts.append((_spoken(key), low if low == high else spread))
    return facts


def _spoken(key: str) -> str:
    return key.replace("_", " ")


def _layer_table(initialisation: Initialisation) -> Table:
    keys = tuple(dict.fromkeys(key for layer in initialisation.layers for key in layer.values))
    rows = tuple(
        (
            layer.name,
            " × ".join(map(str, layer.shape)) or wording.NOTHING,
            wording.setting(layer.rank),
            *(wording.significant(layer.values.get(key)) for key in keys),
        )
        for layer in initialisation.layers
    )
    data = tuple(
        {"layer": layer.name, "shape": " x ".join(map(str, layer.shape)), "rank": layer.rank, **layer.values}
        for layer in initialisation.layers
    )
    return Table(headers=("layer", "shape", "rank", *map(_spoken, keys)), rows=rows, name="layers", data=data)


def _places(run: Path) -> list[tuple[str, str]]:
    """The files that exist, relative to the run directory, each with what it is."""
    quantised = (run / "frozen_base").exists()
    known = {
        "adapter": "the trained adapter, in PEFT's format, on "
        + ("frozen_base" if quantised else "the original base model"),
        "frozen_base": "the frozen weights that training saw, quantised and dequantised",
        "merged": "the merged model, safetensors and tokeniser",
        "checkpoints": "the checkpoints along training",
        "eval/results.json": "all scores",
        "eval/items": "what every model answered, item by item",
        "metrics.jsonl": "every logged step",
        "init/report.json": "the initialisation, layer by layer",
        "init/ranks.png": "the rank of every layer, by depth and module type",
        "config.yaml": "the resolved configuration, enough to repeat the run",
        "environment.json": "versions and hardware",
    }
    return [(name, meaning) for name, meaning in known.items() if (run / name).exists()]


def _snippets(record: RunRecord) -> list[Snippet]:
    run, base = record.path, record.setting("model.path")
    if base is None and record.evaluation:
        base = record.evaluation.base_model
    served = re.sub(r"[^\w.-]+", "-", record.name, flags=re.ASCII).strip("-") or "tuned"
    found = []
    task = str(record.setting("task") or "causal_lm")
    generates = task in ("causal_lm", "image_text")
    model_class = _model_class(task)
    readers = {"image_text": "AutoProcessor", "image_classification": "AutoImageProcessor"}
    reader = readers.get(task, "AutoTokenizer")
    name = "processor" if task in readers else "tokenizer"
    if (run / "adapter").is_dir() and base:
        adapter = run / "adapter"
        config = read_json(adapter / "adapter_config.json") if (adapter / "adapter_config.json").exists() else {}
        base = config.get("base_model_name_or_path") or base  # a quantised run's adapter lies on its frozen base
        if (run / "base").is_dir():  # the base with a head of as many classes
            base = run / "base"
        python = (
            "from peft import PeftModel\n"
            f"from transformers import {model_class}, {reader}\n\n"
            f"{name} = {reader}.from_pretrained({str(base)!r})\n"
            f"base = {model_class}.from_pretrained({str(base)!r}, dtype='auto')\n"
            f"model = PeftModel.from_pretrained(base, {str(adapter)!r})"
        )
        found.append(Snippet("Load the adapter with PEFT", "python", python))
        lora = f"{served}={adapter}"
        command = (
            f"vllm serve {shlex.quote(str(base))} --enable-lora --max-lora-rank {_served_rank(config)} \\\n"
            f"  --lora-modules {shlex.quote(lora)}"
        )
        if generates and not config.get("use_dora"):  # vLLM has no such layers; merged/ is served
            found.append(Snippet("Serve the adapter with vLLM", "sh", command))
    if (run / "merged").is_dir() and not generates:
        python = (
            f"from transformers import {model_class}\n\nmodel = {model_class}.from_pretrained({str(run / 'merged')!r})"
        )
        found.append(Snippet("Load the merged model", "python", python))
    elif (run / "merged").is_dir():
        command = f"vllm serve {shlex.quote(str(run / 'merged'))} --served-model-name {served}"
        found.append(Snippet("Serve the merged model with vLLM", "sh", command))
    return found


def _model_class(task: str) -> str:
    """The name of transformers' class for a task."""
    if task == "causal_lm":
        return "AutoModelForCausalLM"
    from harness.models.loading import auto_class

    return auto_class(task).__name__


def _served_rank(config: Mapping[str, Any]) -> int:
    """The smallest rank that vLLM can be started with and that holds every layer of an adapter of ``config``."""
    rank = max([config.get("r", 1), *config.get("rank_pattern", {}).values()])
    return next((served for served in _SERVED_RANKS if served >= rank), rank)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys: {"train": {"seed": 1}} → {"train.seed": "1"}."""
    flat: dict[str, str] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= _flat(inner, f"{prefix}{key}.")
        elif isinstance(inner, list | tuple) and not any(isinstance(item, Mapping | list) for item in inner):
            flat[f"{prefix}{key}"] = ", ".join(map(wording.setting, inner)) or wording.NOTHING
        elif isinstance(inner, list | tuple):
            flat[f"{prefix}{key}"] = json.dumps(inner, ensure_ascii=False)
        else:
            flat[f"{prefix}{key}"] = wording.setting(inner)
    return flat


# ---------------------------------------------------------------- several runs


def _comparison_view(
    records: Sequence[RunRecord], labels: Sequence[str], folder: Path, title: str, baseline: int
) -> dict[str, Any]:
    against = baseline_table(records, labels, baseline) if len(records) > 1 else None
    return {
        "title": title,
        "subtitle": f"{len(records)} run{'s' if len(records) > 1 else ''}",
        "summary": wording.comparison_summary(records, labels),
        "misleading": wording.MISLEADING,
        "cautions": wording.comparison_cautions(records),
        "scores": _comparison_table(records, labels),
        "intervals": any(record.evaluation and record.evaluation.has_intervals for record in records),
        "t_meaning": _common_t_meaning(records),
        "baseline": labels[baseline],
        "against": against,
        "untested": bool(against) and all(row[4] == wording.NOTHING for row in against.rows),
        "figures": _comparison_figures(records, labels),
        "diagnostics": _diagnostics_comparison(records, labels),
        "differences": _differences(records, labels),
        "reports": _reports(records, labels, folder),
        "notes": _comparison_notes(records, labels),
    }


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """The runs' names; those that share one carry their folder, and a number where that is shared too."""
    names = [record.name for record in records]
    labels = [
        name if names.count(name) == 1 or name == record.path.name else f"{name} ({record.path.name})"
        for name, record in zip(names, records, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[: index + 1].count(label)}"
        for index, label in enumerate(labels)
    ]


def _comparison_table(records: Sequence[RunRecord], labels: Sequence[str], with_intervals: bool = True) -> Table:
    def shown(model: EvaluatedModel | None, name: str) -> str:
        return wording.quantity(model, name) if with_intervals else wording.number(getattr(model, name, None))

    evaluations = [record.evaluation for record in records if record.evaluation]
    knowledge = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.knowledge))
    tasks = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.task))
    tasks = [name for name in tasks if name not in knowledge]
    every = [*knowledge, *tasks]
    rows = _base_rows(records, labels, every, shown)
    paths = [figures.kt_path(record) for record in records]
    ends = {place: path.points[-1] for place, path in enumerate(paths) if path and path.ends}
    leading = dict(zip(ends, figures.on_front(list(ends.values())), strict=True))
    data: list[Mapping[str, Value]] = []
    best_kt = max((evaluation.final.KT or 0.0 for evaluation in evaluations if evaluation.final), default=0.0)
    strong = set()
    for place, (record, label) in enumerate(zip(records, labels, strict=True)):
        final = record.evaluation.final if record.evaluation else None
        best = record.evaluation.best if record.evaluation else None
        if final and final.KT and round(final.KT, 2) == round(best_kt, 2) and len(records) > 1:
            strong.add(len(rows))
        rows.append(
            (
                label,
                *(shown(final, name) for name in _BOUNDED),
                f"{wording.number(best.KT)} ({best.step})" if best else wording.NOTHING,
                wording.method(record),
                wording.anchor(record),
                wording.setting(record.setting("train.learning_rate")),
                wording.number(record.steps, 0),
                wording.number(record.training_seconds, 0),
                *(wording.score(final.scores.get(name) if final else None) for name in every),
            )
        )
        data.append(
            {
                "run": label,
                "folder": str(record.path),
                **_model_columns(final, every),
                "on_pareto_front": leading.get(place),
                "best_KT": best.KT if best else None,
                "best_step": best.step if best else None,
                "method": wording.method(record),
                "anchor": wording.anchor(record),
                "learning_rate": record.setting("train.learning_rate"),
                "steps": record.steps,
                "training_seconds": record.training_seconds,
            }
        )
    return Table(
        headers=(
            *("run", *_QUANTITY_HEADERS, "best KT", "method", "anchor", "learning rate", "steps", "training"),
            *knowledge,
            *tasks,
        ),
        hints=(
            *("", "learned", "kept", "both", "raw", "(step)", "", "", "peak", "", "seconds"),
            *("knowledge" for _ in knowledge),
            *("task" for _ in tasks),
        ),
        rows=tuple(rows),
        name="scores",
        strong=frozenset(strong),
        text=frozenset({0, 6, 7}),
        data=(*_base_data(records, labels, every), *data),
    )


def _base_data(records: Sequence[RunRecord], labels: Sequence[str], tasks: Sequence[str]) -> list[Mapping[str, Value]]:
    return [
        {"run": f"base of {label}", "folder": str(record.path), **_model_columns(record.evaluation.base, tasks)}
        for record, label in zip(records, labels, strict=True)
        if record.evaluation and record.evaluation.base
    ]


def _base_rows(
    records: Sequence[RunRecord],
    labels: Sequence[str],
    tasks: Sequence[str],
    shown: Callable[[EvaluatedModel, str], str],
) -> list[tuple[str, ...]]:
    """One row for each distinct base result: runs of one base share it."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for record, label in zip(records, labels, strict=True):
        base = record.evaluation.base if record.evaluation else None
        if base is not None:
            cells = (
                *(shown(base, name) for name in _BOUNDED),
                *(wording.NOTHING for _ in range(6)),
                *(wording.score(base.scores.get(name)) for name in tasks),
            )
            rows.setdefault(cells, []).append(label)
    if len(rows) == 1:
        return [("base", *cells) for cells in rows]
    return [(f"base of {wording.listing(sharing)}", *cells) for cells, sharing in rows.items()]


def _common_t_meaning(records: Sequence[RunRecord]) -> str | None:
    evaluations = [record.evaluation for record in records if record.evaluation]
    meanings = list(dict.fromkeys(map(wording.t_meaning, evaluations)))
    return meanings[0] if len(meanings) == 1 else None


def _comparison_figures(records: Sequence[RunRecord], labels: Sequence[str]) -> list[Figure]:
    paths = [figures.kt_path(record, label) for record, label in zip(records, labels, strict=True)]
    axes = {wording.t_axis(record.evaluation) for record in records if record.evaluation}
    t_axis = axes.pop() if len(axes) == 1 else "task learned (references differ)"
    drawn = [
        (
            _PLANE,
            figures.kt_figure([path for path in paths if path], t_axis),
            (
                "Each line is one run: from the base (star) through its evaluated checkpoints (small "
                "marks) to its end (large mark). Numbers are optimiser steps, left out where they would "
                "cover something.",
                *_PLANE_AXES,
                "Compare at equal T: of two paths, the upper one kept more when it had learned as much.",
            ),
        ),
        (
            _FRONT,
            figures.pareto_figure([path for path in paths if path], t_axis),
            (
                "The end of every run, with 95 % intervals where they are known. The dashed line joins the Pareto "
                "front (larger marks): no other run has both more K and more T.",
                "Runs whose intervals overlap may change places on other questions: the table of differences has the "
                "paired tests.",
            ),
        ),
        (
            "Forgetting",
            figures.forgetting_figure(records, labels),
            (
                "Loss on the preserve set, and K of the evaluated checkpoints. The dashed line is the base (K = 1).",
                *_bands(records),
            ),
        ),
        (
            "Training loss",
            figures.loss_figure(records, labels),
            ("How fast each run fitted its training data; this says nothing about what it kept.",),
        ),
        (
            "Diagnostics",
            figures.diagnostics_comparison_figure(records, labels),
            (
                "The exact update ΔW of the original weights, means over all adapted layers.",
                *_DIAGNOSTICS_CAPTION,
            ),
        ),
    ]
    return _figures(drawn)


def _bands(records: Sequence[RunRecord]) -> tuple[str, ...]:
    known = any(record.evaluation and record.evaluation.has_intervals for record in records)
    return ("The bands are 95 % intervals over items.",) if known else ()


def _differences(records: Sequence[RunRecord], labels: Sequence[str]) -> Table | None:
    """Every configuration key that is not the same in all runs; None where there is none or one run."""
    flat = [_flat(record.config or {}) for record in records]
    keys = dict.fromkeys(key for config in flat for key in config if key != "name")
    rows = [(key, *(config.get(key, wording.NOTHING) for config in flat)) for key in keys]
    differing = tuple(row for row in rows if len(set(row[1:])) > 1)
    text = frozenset(range(len(labels) + 1))
    return Table(("key", *labels), differing, name="configuration", text=text) if differing else None


def _reports(records: Sequence[RunRecord], labels: Sequence[str], folder: Path) -> list[tuple[str, str, str | None]]:
    """Label, run directory, and a relative link to its report where there is one."""
    found = []
    for record, label in zip(records, labels, strict=True):
        page = record.path / "report.html"
        link = quote(Path(os.path.relpath(page, folder.resolve())).as_posix()) if page.exists() else None
        found.append((label, str(record.path), link))
    return found


def _comparison_notes(records: Sequence[RunRecord], labels: Sequence[str]) -> list[str]:
    notes: dict[str, list[str]] = {}
    for record, label in zip(records, labels, strict=True):
        absent = [] if record.evaluation else ["It has not been evaluated yet."]
        if record.evaluation and record.evaluation.final and not record.evaluation.has_intervals:
            absent.append("Its evaluation kept no answers: it has no intervals and is in no paired test.")
        for note in (*absent, *_notes(record)):
            notes.setdefault(note, []).append(label)
    return [
        note if len(named) == len(records) else f"{wording.listing(named)}: {note}" for note, named in notes.items()
    ]


# ---------------------------------------------------------------- templates


def _write(folder: Path, template: str, view: Mapping[str, Any]) -> Path:
    environment = _environment()
    write_tables(folder, [part for part in view.values() if isinstance(part, Table)])
    for kind in ("md", "html"):  # the HTML last: where it is new, both are
        text = environment.get_template(f"{template}.{kind}.j2").render(view)
        write_text(folder / f"report.{kind}", text)
    return folder / "report.html"


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": _markdown, "fence": _fence, "codes": _codes}
    environment.globals |= {"NOT_RUN": wording.NOT_RUN, "COLOURS": figures.COLOURS}
    return environment


def _markdown(text: str) -> str:
    """Text that Markdown shows unchanged, in a paragraph or a table cell; ``_`` inside a word is harmless."""
    return re.sub(r"([\\`*\[\]<>#|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def _codes(text: str) -> "Markup":
    """Text as HTML, with what stands between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _fence(code: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{ticks}{language}\n{code.rstrip()}\n{ticks}"
