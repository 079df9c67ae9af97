"""Ray clusters of several nodes on this machine, and drivers that run on them as processes of their own."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

HARNESS = str(Path(sys.executable).parent / "harness")
WAIT_SECONDS = 300.0
_STORE_BYTES = 100 * 2**20


@contextmanager
def cluster_of(nodes: Sequence[Mapping[str, float]]) -> Iterator[Any]:
    """A cluster whose nodes, the head first, have one CPU each and these resources."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for resources in nodes:
            add_node(cluster, resources)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any, resources: Mapping[str, float]) -> None:
    """Another node; Ray gives a node 30 seconds to start, which a busy machine may need more than once of."""
    for tries_left in (2, 1, 0):
        try:
            cluster.add_node(**node_options(resources))
            return
        except Exception as error:
            if not tries_left or "timed out" not in str(error):
                raise


def node_options(resources: Mapping[str, float]) -> dict[str, Any]:
    return {
        "num_cpus": 1,
        "num_gpus": 0,
        "object_store_memory": _STORE_BYTES,
        "include_dashboard": False,
        "resources": dict(resources),
    }


class Driver:
    """`harness run --cluster`, started; what it prints is in ``log``."""

    def __init__(self, config: Path, address: str, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [HARNESS, "run", str(config), "--cluster", address, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def finish(self) -> str:
        """Wait for it; fails with what it printed if it fails."""
        code = self.process.wait(2 * WAIT_SECONDS)
        assert code == 0, self.text()
        return self.text()

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for ``condition`` while the driver runs; None when it ended before."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.process.poll() is None:
            if found := condition():
                return found
            assert time.monotonic() < deadline, f"no {what}\n{self.text()}"
            time.sleep(0.01)
        return None

    def workers(self, stage: str) -> list[psutil.Process]:
        """The live workers that were last said to run ``stage``, in the order of ranks."""
        lines = [
            line
            for line in self.text().splitlines()
            if re.match(rf"cluster: [\w, ]*\b{stage}\b[\w, ]*: (rank 0|worker) on", line)
        ]
        found = []
        for number in re.findall(r"process (\d+)", lines[-1]) if lines else []:
            try:
                found.append(psutil.Process(int(number)))
            except psutil.NoSuchProcess:
                return []
        return found


def steps(run: Path) -> list[int]:
    """The steps of the checkpoints of ``run``."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))


def gone(processes: Sequence[psutil.Process], seconds: float = 30.0) -> bool:
    """Whether all ``processes`` end within ``seconds``."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive
