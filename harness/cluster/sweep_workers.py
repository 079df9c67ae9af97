"""Where a sweep's processes run: one after the other here, or as Ray tasks wherever the cluster has room."""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from harness.cluster.connection import connected
from harness.cluster.sweep_process import Job, end, start
from harness.errors import UserError

START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 100 * 10**6  # of a cluster started here: nothing large goes through it
_PASSED_ON = ("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "PALIMPSEST_CACHE_GIB")


@dataclass(frozen=True)
class Need:
    """What a job sets aside, all on one node: ``resources`` by Ray's names, CPU and GPU among them."""

    resources: Mapping[str, float]

    def fits(self, free: Mapping[str, float]) -> bool:
        """Whether ``free`` holds it."""
        return all(free.get(name, 0.0) >= amount for name, amount in self.resources.items())

    def __str__(self) -> str:
        return " + ".join(f"{amount:g} {name}" for name, amount in self.resources.items() if amount)


@dataclass(frozen=True)
class Ended:
    """A job that is over: its exit code, or why there is none: the node or Ray's worker was ``lost``."""

    name: str
    code: int | None
    lost: str | None = None


class Workers(Protocol):
    """Takes jobs and says when they are over."""

    def room(self, need: Need) -> bool:
        """Whether a job may be started now."""

    def start(self, job: Job, need: Need) -> None: ...

    def wait(self, seconds: float) -> list[Ended]:
        """Jobs that have ended, waiting up to ``seconds`` for the first."""

    def close(self) -> None:
        """End every job and let go of what they ran on."""


def passed_on() -> dict[str, str]:
    """The variables of this process that a job on another node must have as well."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


class HereWorkers:
    """One job at a time, on this machine, without Ray."""

    accelerators = False

    def __init__(self) -> None:
        self._running: tuple[str, subprocess.Popen[bytes]] | None = None

    def check(self, needs: Sequence[tuple[str, Need]]) -> None:
        """Nothing to check: a run's own checks say what this machine lacks."""

    def room(self, need: Need) -> bool:
        return self._running is None

    def start(self, job: Job, need: Need) -> None:
        self._running = (job.name, start(job))

    def wait(self, seconds: float) -> list[Ended]:
        if self._running is None:
            return []
        name, process = self._running
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return []
        end(process)  # what it may have left behind
        self._running = None
        return [Ended(name, code)]

    def close(self) -> None:
        if self._running is not None:
            end(self._running[1])
            self._running = None


class RayWorkers:
    """Jobs as Ray tasks. A lost node or worker is an `Ended` with a reason; Ray itself retries nothing."""

    def __init__(self, cluster: str) -> None:
        """``cluster``: ``local`` starts one here that ends with this process; else see `connected`.

        Raises:
            UserError: Ray is not installed, or there is no cluster at that address.
        """
        self._open = ExitStack()
        if cluster == "local":
            _start_here(_ray())
            self._open.callback(_ray().shutdown)
        else:
            self._open.enter_context(connected(cluster))
        self._ray = _ray()
        self._running: dict[Any, tuple[str, Need]] = {}

    @property
    def accelerators(self) -> bool:
        """Whether any node has a GPU."""
        return self._ray.cluster_resources().get("GPU", 0) > 0

    def check(self, needs: Sequence[tuple[str, Need]]) -> None:
        """Raise `UserError` where no node could ever take a job: Ray would wait for one without a word."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for name, need in needs:
            if not any(need.fits(node) for node in nodes):
                has = [Need({key: node[key] for key in need.resources if key in node}) for node in nodes]
                raise UserError(
                    f"cell {name!r}: train.ranks: it needs {need} on one node, and the nodes have "
                    f"{'; '.join(sorted({str(node) for node in has}))}; lower train.ranks or what cluster.*_per_worker "
                    "asks for"
                )

    def room(self, need: Need) -> bool:
        """By the cluster's size now: nodes come and go, and a queue inside Ray would fix the order too early."""
        wanted = Counter(need.resources)
        for _, other in self._running.values():
            wanted.update(other.resources)
        return Need(wanted).fits(self._ray.cluster_resources())

    def start(self, job: Job, need: Need) -> None:
        custom = dict(need.resources)
        options = {"num_cpus": custom.pop("CPU", 0), "num_gpus": custom.pop("GPU", 0), "resources": custom}
        task = self._ray.remote(max_retries=0, **options)(run_job)
        self._running[task.remote(job)] = (job.name, need)

    def wait(self, seconds: float) -> list[Ended]:
        if not self._running:
            time.sleep(seconds)
            return []
        over, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        ended = []
        for reference in over:
            name, _ = self._running.pop(reference)
            try:
                ended.append(Ended(name, self._ray.get(reference)))
            except self._ray.exceptions.RayTaskError as error:  # raised inside: the sweep's folder is not there
                ended.append(Ended(name, None, str(error).strip().splitlines()[-1]))
            except self._ray.exceptions.RayError as error:
                ended.append(Ended(name, None, f"its worker was lost ({type(error).__name__})"))
        return ended

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._open.close()


def _start_here(ray: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to the makers of Ray from here
    for _ in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
            )
            return
        except Exception as error:  # Ray raises no other where its processes took more than half a minute
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
    raise UserError(
        "cluster: local: Ray did not start in time; this machine is busy: try later, or give --cluster none"
    )


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("cluster: ray is not installed; pip install 'ray[default]', or give --cluster none") from error
    return ray


def run_job(job: Job) -> int:
    """The Ray task: start the process on this node and wait for it; its exit code."""
    process = start(job)
    try:
        return process.wait()
    finally:
        end(process)
