"""`harness sweep`: many runs from one YAML, scheduled, resumable, and one table at the end.

The sweep's folder: ``cells/<name>`` the run directories, ``logs/<name>.log`` what each run printed, ``configs/``,
``sweep.log`` what was started when and what was shared, ``sweep.json`` the state that the report is made from. All of
it lies on storage that every node sees under the same path.

What is finished is known from the runs' own stage records alone: a sweep that was killed is continued by the same
command.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.cluster.sweep_cells import Cell, Sweep, load_sweep
from harness.cluster.sweep_process import Job, last_line
from harness.cluster.sweep_schedule import SHARING, Assignment, Schedule
from harness.cluster.sweep_workers import Ended, HereWorkers, Need, RayWorkers, passed_on
from harness.config import RunConfig
from harness.console import say, work_bar
from harness.files import read_json, write_json, write_text
from harness.pipeline import STAGES, locked
from harness.run_directory import RunDirectory, cache_directory

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30.0  # without a run, until the reason is said
LOST_WORKERS = 5  # in a row, without a step forward, until a run is given up


@dataclass
class _Attempts:
    """Failures of one run since it last got further."""

    reached: tuple[int, int] = (0, 0)
    failures: int = 0
    losses: int = 0


def sweep(path: Path, cluster: str = "local", out: Path | None = None) -> tuple[Path, int]:
    """Run every cell of the sweep in ``path`` that is not finished; write table, figure and report.

    Args:
        cluster: ``local`` (Ray, started here), ``none`` (one run after the other, no Ray), or a Ray address.
        out: the sweep's folder, see `load_sweep`.

    Returns:
        The folder, and how many cells failed.

    Raises:
        UserError: before anything runs: a cell that cannot work, no such cluster, a folder in use.
        KeyboardInterrupt: passed on; what is finished is kept.
    """
    from harness.reporting.sweep import write_sweep

    loaded = load_sweep(path, out)
    with locked(RunDirectory(loaded.folder)):
        schedule = Schedule(loaded.cells)
        failed = _Driver(loaded, schedule, cluster).run()
        write_sweep(loaded.folder)
    return loaded.folder, failed


def tabulate(path: Path, out: Path | None = None) -> Path:
    """Write table, figure and report of what is finished, running nothing; also beside a sweep that is running.

    Returns:
        The sweep's folder.
    """
    from harness.reporting.sweep import write_sweep

    loaded = load_sweep(path, out)
    schedule = Schedule(loaded.cells)
    earlier = loaded.folder / "sweep.json"
    known = {cell["name"]: cell for cell in read_json(earlier)["cells"]} if earlier.is_file() else {}
    status, errors = {}, {}
    for cell in loaded.cells:
        status[cell.name] = schedule.status(cell)
        before = known.get(cell.name, {})
        if status[cell.name] != "finished" and before.get("status") == "failed":
            status[cell.name], errors[cell.name] = "failed", before["error"]
    write_state(loaded, status, errors)
    write_sweep(loaded.folder)
    return loaded.folder


def need_of(config: RunConfig, accelerators: bool) -> Need:
    """What a run sets aside, by ``cluster.*_per_worker`` of its configuration; a rank is a worker.

    ``accelerators``: whether the cluster has any; ``cluster.gpus_per_worker: auto`` is one then.
    """
    cluster = config.cluster
    gpus = int(accelerators) if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    per_rank = {"CPU": cluster.cpus_per_worker, "GPU": gpus, **cluster.resources_per_worker}
    return Need({name: float(ranks_of(config) * amount) for name, amount in per_rank.items() if amount})


def ranks_of(config: RunConfig) -> int:
    """How many ranks a run has; ``train.ranks: auto`` is one here, for a sweep shares machines among its runs."""
    return config.train.ranks if isinstance(config.train.ranks, int) else 1


class _Driver:
    """Starts what may start, notes what ends, until nothing is left."""

    def __init__(self, sweep: Sweep, schedule: Schedule, cluster: str) -> None:
        self._sweep, self._schedule, self._cluster = sweep, schedule, cluster
        self._by_name = {cell.name: cell for cell in sweep.cells}
        self._attempts = {cell.name: _Attempts(reached(cell)) for cell in sweep.cells}
        self._running: dict[str, Assignment] = {}
        self._errors: dict[str, str] = {}
        self._workers: HereWorkers | RayWorkers

    def run(self) -> int:
        """All cells; the number of failed ones."""
        total, done = len(self._sweep.cells), self._schedule.count("finished")
        self._write_state()
        if done == total:
            say(f"sweep: all {total} runs are finished")
            return 0
        self._workers = HereWorkers() if self._cluster == "none" else RayWorkers(self._cluster)
        try:
            accelerators = self._workers.accelerators
            self._needs = {cell.name: need_of(cell.config, accelerators) for cell in self._sweep.cells}
            self._workers.check(list(self._needs.items()))
            already = f", {done} of them finished" if done else ""
            say(f"sweep: {total} runs{already}; what they print is in {self._sweep.folder / 'logs'}")
            with work_bar("sweep", total) as bar:
                bar(done, "")
                self._loop(bar)
        except KeyboardInterrupt:
            done = self._schedule.count("finished")
            say(f"sweep: stopped, {done} of {total} runs finished; the same command goes on from here")
            raise
        finally:
            self._workers.close()
        return self._schedule.count("failed")

    def _loop(self, bar: Any) -> None:
        idle_since: float | None = time.monotonic()
        while not self._schedule.over:
            self._start_ready()
            if self._running:
                idle_since = time.monotonic()
            elif idle_since is not None and time.monotonic() > idle_since + PATIENCE_SECONDS:
                say("sweep: no node has room for any of the runs that are left; waiting for one to join the cluster")
                idle_since = None
            bar(0, ", ".join(sorted(self._running)[:3]) + (" …" if len(self._running) > 3 else ""))
            for ended in self._workers.wait(POLL_SECONDS):
                self._note_end(ended, bar)
            self._hand_on()

    def _start_ready(self) -> None:
        """Start what fits; the state is looked at anew after each, since a started run holds what others want."""
        limit = self._sweep.options.parallel
        while limit is None or len(self._running) < limit:
            fitting = (a for a in self._schedule.ready() if self._workers.room(self._needs[a.cell.name]))
            assignment = next(fitting, None)
            if assignment is None:
                return
            leading = self._schedule.start(assignment)
            self._running[assignment.cell.name] = assignment
            self._workers.start(self._job(assignment), self._needs[assignment.cell.name])
            shares = f", whose {' and '.join(leading)} others wait for" if leading else ""
            self._log(f"start {assignment.cell.name}: {assignment.stages[0]} to {assignment.stages[-1]}{shares}")

    def _job(self, assignment: Assignment) -> Job:
        cell, folder = assignment.cell, self._sweep.folder
        config, log = folder / "configs" / f"{cell.name}.yaml", folder / "logs" / f"{cell.name}.log"
        write_text(config, cell.config.dump())
        log.parent.mkdir(parents=True, exist_ok=True)
        kept = str(cache_directory().absolute())
        environment = {**passed_on(), "PALIMPSEST_CACHE": kept, **cell.config.cluster.environment}
        if self._workers.accelerators and "GPU" not in self._needs[cell.name].resources:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # what was not set aside is another run's
        threads = cell.config.cluster.cpus_per_worker
        return Job(cell.name, str(config), assignment.stages, str(log), threads, environment)

    def _hand_on(self) -> None:
        """Look at the records of running cells: what a stage left is there for others while the run goes on."""
        for name in self._running:
            cell = self._by_name[name]
            for stage in SHARING:
                if _recorded(cell, stage):
                    self._schedule.stage_finished(cell, stage)

    def _note_end(self, ended: Ended, bar: Any) -> None:
        cell = self._by_name[ended.name]
        assignment = self._running.pop(ended.name)
        if ended.code == 0:
            self._schedule.ended(cell, "done")
            self._attempts[cell.name] = _Attempts(reached(cell))
            self._log(f"done {cell.name}: {assignment.stages[0]} to {assignment.stages[-1]}")
            if self._schedule.status(cell) == "finished":
                self._errors.pop(cell.name, None)
                bar(1, "")
                self._say(f"{cell.name} finished")
                self._write_state()
            return
        why = ended.lost or last_line(self._sweep.folder / "logs" / f"{cell.name}.log")
        again = self._try_again(cell, lost=ended.lost is not None)
        self._schedule.ended(cell, "again" if again else "failed")
        self._log(f"{'again' if again else 'failed'} {cell.name}: {why}")
        if again:
            say(f"sweep: {cell.name} goes on from what it left: {why}")
            return
        self._errors[cell.name] = why
        bar(1, "")
        say(f"sweep: {cell.name} failed and is left out: {why}")
        self._write_state()

    def _try_again(self, cell: Cell, lost: bool) -> bool:
        """A failure is tried once more, a lost node a few times; a run that got further starts counting anew."""
        attempts, now = self._attempts[cell.name], reached(cell)
        if now > attempts.reached:
            attempts = self._attempts[cell.name] = _Attempts(now)
        if lost:
            attempts.losses += 1
        else:
            attempts.failures += 1
        return attempts.failures <= 1 and attempts.losses <= LOST_WORKERS

    def _say(self, line: str) -> None:
        total = len(self._sweep.cells)
        say(f"sweep: {self._schedule.count('finished')}/{total} {line}")

    def _log(self, line: str) -> None:
        with (self._sweep.folder / "sweep.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%F %T')} {line}\n")

    def _write_state(self) -> None:
        write_state(self._sweep, {cell.name: self._schedule.status(cell) for cell in self._sweep.cells}, self._errors)


def write_state(sweep: Sweep, status: Mapping[str, str], errors: Mapping[str, str]) -> None:
    """Write ``sweep.json``: what the report needs besides the run directories."""
    cells = [
        {
            "name": cell.name,
            "label": cell.label,
            "seed": cell.seed,
            "overrides": dict(cell.overrides),
            "status": "unfinished" if status[cell.name] in ("waiting", "running") else status[cell.name],
            "error": errors.get(cell.name),
            "run": str(cell.run.path.relative_to(sweep.folder)),
        }
        for cell in sweep.cells
    ]
    content = {"schema": 1, "title": sweep.title, "baseline": sweep.options.baseline, "cells": cells}
    write_json(sweep.folder / "sweep.json", content)


def reached(cell: Cell) -> tuple[int, int]:
    """How far a run has come: finished stages, and the step of its newest checkpoint."""
    checkpoints = cell.run.finished_checkpoints()
    return sum(_recorded(cell, stage) for stage in STAGES), checkpoints[-1][0] if checkpoints else 0


def _recorded(cell: Cell, stage: str) -> bool:
    path = cell.run.stages / f"{stage}.json"
    return path.is_file() and bool(read_json(path)["finished"])
