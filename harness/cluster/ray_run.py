"""`harness run --cluster`: the stages of a run as work of a Ray cluster.

calibrate, prepare, train and export run on ``train.ranks`` workers that are placed together; init on as many as the
cluster has room for, because layers are decomposed one by one; answers and eval on one worker, wherever there is room;
the report is written here. Every rank runs what it runs under the DeepSpeed launcher (`harness.gang.run_rank`).
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from harness.cluster.connection import connected
from harness.cluster.placement import (
    Shape,
    dividing,
    evaluation_shape,
    idle_room,
    live_nodes,
    wanted_ranks,
    worker_shape,
)
from harness.cluster.storage import Storage
from harness.cluster.supervision import supervise
from harness.cluster.worker import Order
from harness.config import ClusterConfig, RunConfig, load_config, read_content, resolve
from harness.console import say
from harness.errors import UserError, mendable
from harness.files import write_text
from harness.pipeline import FIRST_STAGES, GANG_STAGES, STAGES, discard_from, has_work, is_finished, locked, run_stages
from harness.preflight import check
from harness.reporting.summary import print_summary
from harness.run_directory import RunDirectory

CLIENT = "ray://"


def run_file(
    file: Path, overrides: Sequence[str] | None, stages: Sequence[str], force: str | None, address: str
) -> None:
    """Run the configuration ``file`` on the cluster at ``address`` and print what came out.

    Through Ray Client (``ray://``) the driver itself runs on the cluster: paths are read there, not here.

    Raises:
        UserError: no such cluster, no room on it, or whatever `harness.run.run` refuses.
    """
    if not address.startswith(CLIENT):
        print_summary(run(load_config(file, list(overrides or [])), address, stages, force))
        return
    content = read_content(file, list(overrides or []))
    if isinstance(folder := content.get("output_dir", "runs"), str):  # else it is refused with the rest
        content["output_dir"] = str(Path(folder).expanduser().absolute())
    with connected(address):
        import ray

        # No second try by Ray: stages are resumed, not repeated, and that is for a new command to ask for.
        driver = ray.remote(_run_content).options(num_cpus=0, max_retries=0)
        mistake, summary = ray.get(driver.remote(content, str(file.absolute().parent), list(stages), force))
    if mistake is not None:
        raise UserError(mistake)
    say(summary.rstrip())


def run(config: RunConfig, address: str, stages: Sequence[str] = STAGES, force: str | None = None) -> RunDirectory:
    """`harness.run.run` on the cluster at ``address``.

    Raises:
        UserError: no such cluster, no room on it, or whatever `harness.run.run` refuses.
    """
    for stage in [*stages, *([force] if force else [])]:
        if stage not in STAGES:
            raise UserError(f"stage: {stage!r} given; allowed: {', '.join(STAGES)}")
    check(config)
    if address == "local":  # nothing can join it, so there is nothing to wait for
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"wait_minutes": 0.0})})
    with connected(address):
        return _run_connected(config, stages, force)


def _run_content(content: dict[str, Any], folder: str, stages: list[str], force: str | None) -> tuple[str | None, str]:
    """What Ray Client's driver runs on the cluster: a line that the user can act on, and the summary."""
    summary = io.StringIO()
    try:
        config = resolve(content, Path(folder))
        check(config)
        directory = _run_connected(config, stages, force)
        with redirect_stderr(summary):
            print_summary(directory)
    except Exception as error:
        if (line := mendable(error)) is None:
            raise
        return str(line), ""
    return None, summary.getvalue()


def _run_connected(config: RunConfig, stages: Sequence[str], force: str | None) -> RunDirectory:
    shared = config.cluster.storage
    url = shared if shared is not None and "://" in shared else None
    if shared is not None and url is None:
        config = config.model_copy(update={"output_dir": str(Path(shared).expanduser().absolute())})
    cluster_run = ClusterRun(config, url)
    cluster_run.run(stages, force)
    return cluster_run.directory


class ClusterRun:
    """One run on the cluster that this process is connected to; ``url``: where nodes get it from, if not a folder."""

    def __init__(self, config: RunConfig, url: str | None) -> None:
        self._config = config
        self._url = url
        self._storage = None if url is None else Storage(url, config.run_directory)
        self.directory = RunDirectory(config.run_directory)

    def run(self, stages: Sequence[str], force: str | None) -> None:
        """Run those of ``stages`` that are not finished."""
        self._pull()
        if force is not None:
            with locked(self.directory):
                discard_from(self.directory, force)
            self._push()
        if self._pending(stages, FIRST_STAGES):
            self._on_one_worker("answers")
        if pending := self._pending(stages, GANG_STAGES):
            write_text(self.directory.config, self._config.dump())
            for group, workers in self._divided(pending):
                self._on_gang(group, workers)
        if self._pending(stages, ("eval",)):
            if self._config.eval.knowledge or self._config.eval.task:
                self._on_one_worker("eval")
            else:
                run_stages(self._config, ["eval"])
        if self._pending(stages, ("report",)):
            run_stages(self._config, ["report"])
        self._push()

    def _pending(self, stages: Sequence[str], among: Sequence[str]) -> list[str]:
        asked = [stage for stage in stages if stage in among and has_work(self._config, stage)]
        return [stage for stage in asked if not is_finished(self._config, self.directory, stage)]

    def _divided(self, pending: list[str]) -> list[tuple[list[str], int | None]]:
        """``pending`` in groups that run on the same workers, with their number where it is not that of ranks.

        Workers are not started anew for each stage without need.
        """
        if self._url is not None:  # nodes see each other's files between groups only
            return [([stage], None) for stage in pending]
        decomposers = self._decomposers() if "init" in pending else 0
        if decomposers <= wanted_ranks(self._config, live_nodes()):
            return [(pending, None)]
        at = pending.index("init")
        groups = [(pending[:at], None), (["init"], decomposers), (pending[at + 1 :], None)]
        return [(stages, workers) for stages, workers in groups if stages]

    def _decomposers(self) -> int:
        """How many workers decompose layers: as configured, else as many as the cluster has idle room for."""
        from harness.methods.registry import method_class

        if method_class(self._config.method["name"]).trains_base:
            return 1  # nothing is decomposed
        configured = self._config.cluster.init_workers
        return idle_room(worker_shape(self._config.cluster, live_nodes())) if configured == "auto" else configured

    def _on_gang(self, stages: list[str], workers: int | None = None) -> None:
        nodes, cluster = live_nodes(), self._config.cluster
        shape, ranks = worker_shape(cluster, nodes), wanted_ranks(self._config, nodes)
        counts = dividing(self._config, ranks)
        if workers is not None:  # layers do not mind how many decompose them
            shape, counts = Shape(shape.resources, "spread"), list(range(workers, 0, -1))
            cluster = cluster.model_copy(update={"on_loss": "continue"})
        elif self._url is not None and stages != ["train"]:
            # Ranks of these stages read each other's files, which only those of one node can.
            shape = Shape(shape.resources, "strict_pack")
            counts = [count for count in counts if shape.fit(count, nodes)] or [1]
        self._supervise(stages, True, shape, counts, cluster)

    def _on_one_worker(self, stage: str) -> None:
        shape = evaluation_shape(self._config.cluster, live_nodes())
        self._supervise([stage], False, shape, [1], self._config.cluster)

    def _supervise(
        self, stages: list[str], joined: bool, shape: Shape, counts: list[int], cluster: ClusterConfig
    ) -> None:
        def remaining() -> Order:
            return Order(self._config, tuple(self._pending(stages, stages)), joined, self._url)

        supervise(remaining, shape, counts, cluster, self._progress)
        self._pull()

    def _progress(self) -> object:
        """What is finished: stages, checkpoints, and the parts of stages that are kept one by one."""
        self._pull()
        run = self.directory
        records = {file.name: file.read_bytes() for file in run.stages.glob("*.json")} if run.stages.is_dir() else {}
        parts = [run.path / ".init.staging", run.answers, run.prepared, run.statistics]
        files = [file for folder in parts if folder.is_dir() for file in folder.rglob("*") if file.is_file()]
        kept = {str(file) for file in files if file.suffix != ".tmp"}
        return records, [step for step, _ in run.finished_checkpoints()], kept

    def _pull(self) -> None:
        if self._storage is not None:
            self._storage.pull()

    def _push(self) -> None:
        if self._storage is not None:
            self._storage.push()
