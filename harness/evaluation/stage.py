"""The evaluation of a run: base, final model and checkpoints on the same tasks, with K, T and KT for each."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.console import say
from harness.errors import UserError
from harness.evaluation import base_cache
from harness.evaluation.candidates import Candidate
from harness.evaluation.engines import evaluate
from harness.evaluation.retention import Retention, retention
from harness.evaluation.scores import CandidateScores
from harness.evaluation.tasks import check_tasks
from harness.files import read_json, write_json
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
) -> dict[str, Any]:
    """Evaluate a run and write ``eval/results.json``.

    Args:
        base_model: folder or hub id of the model that the run started from.
        run: the run directory; reads ``adapter/`` or ``merged/`` and ``checkpoints/step-N/{adapter,merged}``.
        knowledge: tasks that say what was kept (K).
        task: tasks that say what was learned (T).
        checkpoints: evaluate every saved checkpoint too; the last one is the final model and is evaluated once.
        full_fine_tuning: run directory of an evaluated full fine-tuning run, the reference of T.

    Returns:
        What was written: scores, seconds, K, T and KT of every model, K, T and KT of the final one, and notes.

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
    }
    entry = base_cache.entry_path(base_model, names, **options)
    base = base_cache.read(entry) if entry is not None else None
    if base is not None:
        say(f"eval: base: scores are known ({entry})")
        evaluated = evaluate(tuned, names, batch_size=batch_size, **options)
    else:
        base, *evaluated = evaluate(
            [Candidate("base", None, base_model), *tuned], names, batch_size=batch_size, **options
        )
        if entry is not None:
            base_cache.write(entry, base)

    base_values = _values(base)
    balances = [retention(_values(model), base_values, knowledge, task, reference) for model in evaluated]
    final = balances[-1]
    results = {
        "schema": SCHEMA,
        "base_model": base_model,
        "engine": backend,
        "knowledge": list(knowledge),
        "task": list(task),
        "models": [
            _record(base),
            *(_record(model) | _balance(balance) for model, balance in zip(evaluated, balances, strict=True)),
        ],
        **_balance(final),
        "T_reference": None if full_fine_tuning is None else str(full_fine_tuning),
        "notes": list(final.notes),
    }
    write_json(RunDirectory(run).results, results)
    return results


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


def _values(scores: CandidateScores) -> dict[str, float]:
    return {name: score.value for name, score in scores.scores.items()}


def _record(scores: CandidateScores) -> dict[str, Any]:
    content = asdict(scores)
    del content["answers"]
    return content


def _balance(balance: Retention) -> dict[str, float | None]:
    return {"K": balance.knowledge, "T": balance.task, "KT": balance.balance}
