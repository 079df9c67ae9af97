"""The evaluation of a run: base, final model and checkpoints on the same tasks, with K, T, KT and Avg. for each.

``eval/results.json`` holds scores, quantities and intervals, ``eval/items/<model>.jsonl`` what each model answered.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.config import RunConfig
from harness.errors import UserError
from harness.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Cell
from harness.evaluation.candidates import Candidate
from harness.evaluation.engines import evaluate
from harness.evaluation.intervals import Intervals, Measured, full_fine_tuning_cells, retention_intervals
from harness.evaluation.items import item_scores, write_items
from harness.evaluation.retention import Retention, retention
from harness.evaluation.scores import CandidateScores
from harness.evaluation.tasks import check_tasks
from harness.files import publish_directory, read_json, write_json
from harness.run_directory import RunDirectory

SCHEMA = 1


def evaluate_run(
    base_model: str,
    run: Path,
    *,
    knowledge: Sequence[str],
    task: Sequence[str],
    backend: str = "vllm",
    dtype: str = "bfloat16",
    data_dir: Path | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    checkpoints: bool = False,
    full_fine_tuning: Path | None = None,
    tensor_parallel: int = 1,
    engines: int = 1,
    server: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run and write ``eval/results.json`` and ``eval/items/``.

    Args:
        base_model: folder or hub id of the model that the run started from.
        run: the run directory; reads ``adapter/`` or ``merged/`` and ``checkpoints/step-N/{adapter,merged}``.
        knowledge: tasks that say what was kept (K).
        task: tasks that say what was learned (T).
        checkpoints: evaluate every saved checkpoint too; the last one is the final model and is evaluated once.
        full_fine_tuning: run directory of an evaluated full fine-tuning run, the reference of T.
        tensor_parallel, engines, server: see `harness.evaluation.engines.evaluate`.

    Returns:
        What was written: scores, seconds, K, T, KT, Avg. and their intervals of every model, those of the final one,
        and notes.

    Raises:
        UserError: nothing was exported yet, a task is unknown, or ``full_fine_tuning`` has no usable result.
    """
    names = [*knowledge, *task]
    check_tasks(names, include_path, data_dir)
    reference = None if full_fine_tuning is None else _reference(full_fine_tuning, task)
    tuned = tuned_candidates(base_model, RunDirectory(run), checkpoints)
    options: dict[str, Any] = {
        "backend": backend,
        "dtype": dtype,
        "data_dir": data_dir,
        "include_path": include_path,
        "limit": limit,
        "tensor_parallel": tensor_parallel,
        "engines": engines,
        "server": server,
    }
    models = evaluate([Candidate("base", None, base_model), *tuned], names, batch_size=batch_size, **options)
    return write_results(RunDirectory(run), base_model, backend, models, knowledge, task, full_fine_tuning, reference)


def evaluate_run_directly(config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """`evaluate_run` for tasks that lm-eval has no form for (`harness.evaluation.direct`).

    Args:
        config: ``model.path`` at the base with the task's head.
    """
    from harness.evaluation.direct import ENGINE, evaluate_directly, expanded

    options = config.eval
    knowledge, task = expanded(config, options.knowledge), expanded(config, options.task)
    full = None if options.full_fine_tuning is None else Path(options.full_fine_tuning)
    reference = None if full is None else _reference(full, task)
    base = Candidate("base", None, config.model.path)
    tuned = tuned_candidates(config.model.path, run, options.checkpoints)
    models = evaluate_directly(config, [base, *tuned], [*knowledge, *task])
    return write_results(run, config.model.original, ENGINE, models, knowledge, task, full, reference)


def write_results(
    run: RunDirectory,
    base_model: str,
    engine: str,
    models: Sequence[CandidateScores],
    knowledge: Sequence[str],
    task: Sequence[str],
    full_fine_tuning: Path | None,
    reference: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Write ``eval/results.json`` and ``eval/items/``; ``models``: the base first, the final model last."""
    base, *evaluated = models
    described = {"schema": SCHEMA, "base_model": base_model, "engine": engine}
    content = described | results(base, evaluated, knowledge, task, full_fine_tuning, reference)
    write_all_items(run.items, models)
    write_json(run.results, content)
    return content


def results(
    base: CandidateScores,
    evaluated: Sequence[CandidateScores],
    knowledge: Sequence[str],
    task: Sequence[str],
    full_fine_tuning: Path | None,
    reference: Mapping[str, float] | None,
) -> dict[str, Any]:
    """What ``eval/results.json`` says about the base and the tuned models, of which the last is the final one.

    Args:
        full_fine_tuning: run directory that T is measured against.
        reference: that run's scores on the tasks of ``task``.
    """
    reference_cells = None if full_fine_tuning is None else full_fine_tuning_cells(full_fine_tuning, reference or {})
    base_values = _values(base)
    balances = [retention(_values(model), base_values, knowledge, task, reference) for model in [base, *evaluated]]
    base_cells = _cells(base)
    intervals = [
        retention_intervals(Measured(tuple(knowledge), tuple(task), _cells(model), base_cells, reference_cells))
        for model in [base, *evaluated]
    ]
    final = balances[-1]
    return {
        "knowledge": list(knowledge),
        "task": list(task),
        "models": [
            _record(model) | _balance(balance) | {"intervals": _bounds(found, of_base=model is base)}
            for model, balance, found in zip([base, *evaluated], balances, intervals, strict=True)
        ],
        **_balance(final),
        "intervals": _bounds(intervals[-1]),
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES},
        "T_reference": None if full_fine_tuning is None else str(full_fine_tuning),
        "T_reference_scores": None if reference is None else dict(reference),
        "notes": [*final.notes, *intervals[-1].notes],
    }


def tuned_candidates(base_model: str, run: RunDirectory, checkpoints: bool) -> list[Candidate]:
    """Checkpoints in the order of steps (if wanted), then the final model.

    Raises:
        UserError: one of them was not exported.
    """
    finished = run.finished_checkpoints()
    last = finished[-1][0] if finished else None
    under = run.frozen_base if run.frozen_base.is_dir() else base_model
    earlier = [_exported(f"step-{step}", step, folder, under) for step, folder in finished[:-1] if checkpoints]
    return [*earlier, _exported("final", last, run.path, under)]


def _exported(name: str, step: int | None, folder: Path, base_model: str | Path) -> Candidate:
    adapter, merged = folder / "adapter", folder / "merged"
    if adapter.is_dir():
        return Candidate(name, step, base_model, adapter, merged if merged.is_dir() else None)
    if merged.is_dir():
        return Candidate(name, step, merged)
    raise UserError(f"eval: {folder} holds neither adapter/ nor merged/; run the export stage first")


def _reference(run: Path, task: Sequence[str]) -> dict[str, float]:
    """Final scores of a full fine-tuning run on the tasks of T."""
    path = RunDirectory(run).results
    if not path.is_file():
        raise UserError(f"eval.full_fine_tuning: {run} has no eval/results.json; evaluate that run first")
    final = next(model for model in read_json(path)["models"] if model["name"] == "final")
    missing = [name for name in task if name not in final["scores"]]
    if missing:
        raise UserError(
            f"eval.full_fine_tuning: {path} has no score for '{missing[0]}'; evaluate that run on the same tasks "
            f"(it has {', '.join(final['scores'])})"
        )
    return {name: final["scores"][name]["value"] for name in task}


def _cells(model: CandidateScores) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for name, score in model.scores.items():
        known = item_scores(model.items.get(name, []))
        cells[name] = score.value if known is None else known
    return cells


def write_all_items(folder: Path, models: Sequence[CandidateScores]) -> None:
    """A file for each model; the folder appears whole, without files of an earlier evaluation."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".items-", dir=folder.parent) as temporary:
        staging = Path(temporary) / folder.name
        for model in models:
            write_items(staging / f"{model.name}.jsonl", model.items)
        publish_directory(staging, folder)


def _values(scores: CandidateScores) -> dict[str, float]:
    return {name: score.value for name, score in scores.scores.items()}


def _record(scores: CandidateScores) -> dict[str, Any]:
    content = asdict(scores)
    del content["answers"], content["items"]
    return content


def _balance(balance: Retention) -> dict[str, float | None]:
    return {"K": balance.knowledge, "T": balance.task, "KT": balance.balance, "Avg": balance.average}


def _bounds(intervals: Intervals, of_base: bool = False) -> dict[str, list[float]]:
    """Intervals as pairs. The base's K is 1 by definition and has none."""
    return {name: list(bounds) for name, bounds in intervals.by_quantity.items() if not (of_base and name == "K")}
