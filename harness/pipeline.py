"""The stages in order, each resumable: answers → calibrate → init → prepare → train → export → eval → report.

``answers`` and ``prepare`` have something to do only where penalties or replay ask for it, and are left out elsewhere.

Every finished stage leaves a record in ``stages/`` with the part of the configuration that it came from. A stage with
a matching record is skipped. A changed configuration never quietly mixes with old results: the stages that cost
training time are refused with one line that names the changed key; evaluation and report are simply redone.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.config import RunConfig
from harness.console import say
from harness.environment import describe_environment
from harness.errors import UserError
from harness.files import read_json, write_json, write_text
from harness.methods.registry import build_method, required_statistics
from harness.run_directory import RunDirectory

FIRST_STAGES = ("answers",)  # before the gang: an engine of its own, as for evaluation
GANG_STAGES = ("calibrate", "init", "prepare", "train", "export")
STAGES = (*FIRST_STAGES, *GANG_STAGES, "eval", "report")
REDONE_QUIETLY = ("export", "eval", "report")

# How a run is executed, not what it computes: changing these lets a run go on under other ranks or another ZeRO stage.
_EXECUTION = ("train.deepspeed", "train.ranks", "train.micro_batch_size", "train.gradient_checkpointing")
_READS = {
    "answers": ("model", "data.preserve", "data.answers", "data.max_length", "train.seed"),
    # And the source and kind of the method's statistics.
    "calibrate": ("task", "model", "data.max_length", "method.name", "train.seed"),
    "init": ("task", "model", "data.preserve", "data.train", "data.max_length", "method", "init.solver", "train.seed"),
    "prepare": (
        *("task", "model", "data", "method", "anchor", "penalties", "train.seed"),
        *("train.epochs", "train.max_steps", "train.batch_size"),  # which rows the run will see
    ),
    "train": ("task", "model", "data", "method", "anchor", "penalties", "train"),
    "export": ("task", "model", "data", "method", "anchor", "penalties", "train", "eval.checkpoints"),
    "eval": ("task", "model", "data", "method", "anchor", "penalties", "train", "eval"),
    "report": ("task", "model", "data", "method", "anchor", "penalties", "train", "eval"),
}
# What init reads besides, where it chooses an option by short training runs.
_PROBES_READ = ("train.learning_rate", "train.weight_decay", "train.max_grad_norm")
LOCK_WAIT_SECONDS = 15.0
LOCK_WAIT = "PALIMPSEST_LOCK_WAIT_SECONDS"  # a file server may hold the lock of a node that died for longer


def run_stages(config: RunConfig, stages: list[str], force: str | None = None) -> None:
    """Run those of ``stages`` that are not finished, on all ranks of the gang (or alone).

    Raises:
        UserError: an unknown stage, an earlier stage that is missing, a changed configuration, a run directory in use.
    """
    from harness.training.distributed import rank

    run = RunDirectory(config.run_directory)
    for stage in [*stages, *([force] if force else [])]:
        if stage not in STAGES:
            raise UserError(f"stage: {stage!r} given; allowed: {', '.join(STAGES)}")
    if rank() == 0:
        with locked(run):
            if force is not None:
                discard_from(run, force)
            asked = [stage for stage in stages if has_work(config, stage)]
            pending = _from_main_rank([stage for stage in asked if not is_finished(config, run, stage)])
            if pending:
                _begin(config, run)
            for stage in pending:
                _require_earlier(config, run, stage)
                _run_one(config, run, stage)
    else:
        for stage in _from_main_rank(None):
            _call(stage, config, run)


def has_work(config: RunConfig, stage: str) -> bool:
    """Whether ``stage`` has anything to do under this configuration."""
    if stage not in ("answers", "prepare"):
        return True
    if stage == "answers":
        from harness.stages.answers import answers_wanted

        return answers_wanted(config)
    from harness.training.penalties.registry import entry_needs, penalty_entries

    return any(entry_needs(entry).preparation for entry in penalty_entries(config))


def is_finished(config: RunConfig, run: RunDirectory, stage: str) -> bool:
    """Whether the record of ``stage`` matches the configuration and its outputs are there.

    Raises:
        UserError: the record is of another configuration and redoing the stage would throw work away.
    """
    record = _record(run, stage)
    if not record.is_file():
        return False
    saved = read_json(record)
    inputs = stage_inputs(config, stage)
    changed = sorted(
        key for key in inputs.keys() | saved["inputs"].keys() if inputs.get(key) != saved["inputs"].get(key)
    )
    if changed and stage in REDONE_QUIETLY:
        say(f"{stage}: redone, {changed[0]} has changed")
        return False
    if changed:
        key = "method.name" if "method.name" in changed else changed[0]  # options differ because the method does
        raise UserError(
            f"{key}: {_brief(inputs.get(key))} given, but {run.path} was made with {_brief(saved['inputs'].get(key))}; "
            f"choose another name, or throw that work away with --force {stage}"
        )
    return saved["finished"] and all((run.path / output).exists() for output in saved["outputs"])


def stage_inputs(config: RunConfig, stage: str) -> dict[str, Any]:
    """The part of the configuration that ``stage`` depends on, flat, with the identity of local files."""
    flat = dict(_flatten("", config.model_dump(mode="json")))
    chosen = {
        key: value
        for key, value in flat.items()
        if any(key == part or key.startswith(f"{part}.") for part in _READS[stage]) and key not in _EXECUTION
    }
    if stage not in ("eval", "report"):  # nothing before them reads it
        chosen = {key: value for key, value in chosen.items() if not key.startswith("data.validation")}
    if stage == "calibrate":
        request = required_statistics(config)
        chosen["statistics"] = None if request is None else {**asdict(request), "kinds": list(request.kinds)}
        if request is not None:
            source = "data.preserve." if request.data == "preserve" else "data.train."
            chosen |= {key: value for key, value in flat.items() if key.startswith(source)}
    if stage == "init" and build_method(config.method, config.train.seed).probe() is not None:
        chosen |= {key: flat[key] for key in _PROBES_READ}
    sources = ("train", "preserve", "validation", "replay.source")
    for key in ("model.path", "eval.data_dir", *(f"data.{source}.path" for source in sources)):
        if isinstance(chosen.get(key), str) and Path(chosen[key]).exists():
            chosen[f"{key} (content)"] = _identity(Path(chosen[key]))
    return chosen


def discard_from(run: RunDirectory, stage: str) -> None:
    """Throw away what ``stage`` and every later stage left."""
    leavings: dict[str, list[Path]] = {
        "answers": [run.answers],
        "calibrate": [run.statistics, run.base],
        "init": [run.init],
        "prepare": [run.prepared],
        "train": [run.checkpoints, run.metrics, run.tensorboard],
        "export": [run.adapter, run.merged, run.frozen_base],
        "eval": [run.results.parent],
        "report": [run.path / "report.md", run.path / "report.html", run.path / "tables"],
    }
    for later in STAGES[STAGES.index(stage) :]:
        _record(run, later).unlink(missing_ok=True)
        for path in leavings[later]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """Hold the run directory; the system releases it when the process ends, however it ends.

    Raises:
        UserError: another process holds it and goes on holding it.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / ".lock").open("a+") as file:
        deadline = time.monotonic() + float(os.environ.get(LOCK_WAIT, LOCK_WAIT_SECONDS))
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"output_dir: {run.path} is in use by process {file.read().strip()}; wait for it or end it"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _run_one(config: RunConfig, run: RunDirectory, stage: str) -> None:
    record = {"inputs": stage_inputs(config, stage), "finished": False, "outputs": []}
    write_json(_record(run, stage), record)
    _call(stage, config, run)
    outputs = [str(path.relative_to(run.path)) for path in _outputs(config, run, stage)]
    write_json(_record(run, stage), {**record, "finished": True, "outputs": outputs})


def _call(stage: str, config: RunConfig, run: RunDirectory) -> None:
    """Run a stage; one that trains or evaluates sees the base with the head that the task puts on it."""
    from harness.tasks.registry import load_task

    task = load_task(config)
    if task.has_head and stage != "report":
        from harness.tasks.head import with_head

        config = with_head(task, run)
    _function(stage)(config, run)


def _function(stage: str) -> Callable[[RunConfig, RunDirectory], None]:
    """The function of a stage; imported when it is needed, since stages are heavy."""
    if stage == "answers":
        from harness.stages.answers import answers as function
    elif stage == "calibrate":
        from harness.stages.calibrate import calibrate as function
    elif stage == "init":
        from harness.stages.initialise import initialise as function
    elif stage == "prepare":
        from harness.stages.prepare import prepare as function
    elif stage == "train":
        from harness.stages.train import train as function
    elif stage == "export":
        from harness.stages.export import export as function
    elif stage == "eval":
        from harness.stages.evaluate import evaluate as function
    else:
        from harness.stages.report import report as function
    return function


def _outputs(config: RunConfig, run: RunDirectory, stage: str) -> list[Path]:
    """What must be there for a finished stage to stay finished."""
    if stage == "answers":
        return [run.answers / "answers.jsonl"]
    if stage == "calibrate":
        return [path for path in (run.statistics / "index.json",) if path.exists()]
    if stage == "init":
        return [run.init / "report.json"]
    if stage == "prepare":
        return [run.prepared / "index.json"]
    if stage == "train":
        return [run.finished_checkpoints()[-1][1] / "trained", run.metrics]
    if stage == "export":
        return [path for path in (run.adapter, run.merged, run.frozen_base) if path.exists()]
    if stage == "eval":
        return [path for path in (run.results,) if path.exists()]
    return [run.path / "report.html", run.path / "report.md"]


def _require_earlier(config: RunConfig, run: RunDirectory, stage: str) -> None:
    trained = (*FIRST_STAGES, *GANG_STAGES)
    for earlier in trained[: STAGES.index(stage)]:
        if has_work(config, earlier) and not is_finished(config, run, earlier):
            raise UserError(f"{stage}: the stage {earlier!r} of {run.path} is not finished; run it first")


def _begin(config: RunConfig, run: RunDirectory) -> None:
    write_text(run.config, config.dump())
    write_json(run.environment, describe_environment(config.train.seed))


def _from_main_rank(value: Any) -> Any:
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _record(run: RunDirectory, stage: str) -> Path:
    return run.stages / f"{stage}.json"


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value


def _identity(path: Path) -> list[list[Any]]:
    """Names, sizes and modification times of a file or of the files of a folder; of a folder in it, of all together."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    found: list[list[Any]] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    for folder in [] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_dir()):
        inside = [file.stat() for file in folder.rglob("*") if file.is_file()]
        newest = max((status.st_mtime_ns for status in inside), default=0)
        found.append([folder.name, len(inside), sum(status.st_size for status in inside), newest])
    return found


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
