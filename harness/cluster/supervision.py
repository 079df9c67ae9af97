"""Driving workers: place them, start them, watch them, and begin again when one is lost.

A worker, a node or the network may go at any moment. All workers of the attempt are ended then, a new placement group
is made of what the cluster has, and the stages that are not finished are run again: training goes on from its newest
checkpoint, decompositions from the layers that are there. Failures in a row without anything new end the run.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.cluster.lifeline import Lifeline
from harness.cluster.placement import Shape, reserved
from harness.cluster.worker import Order, Place, Worker, rank_environment
from harness.config import ClusterConfig
from harness.console import say
from harness.errors import UserError

POLL_SECONDS = 0.5
START_SECONDS = 600.0  # processes, and whatever Ray has to prepare for them
SETTLE_SECONDS = 10.0  # for the loss that made a rank fail to be noticed
GONE_SECONDS = 90.0  # a node that went silent is noticed within a minute


@dataclass(eq=False)
class Failure(Exception):
    """An attempt that ended before its stages did.

    Attributes:
        line: what happened, in words.
        error: what a rank raised while no other was lost; None for a loss.
    """

    line: str
    error: Exception | None = None

    def __str__(self) -> str:
        return self.line


@dataclass
class _Running:
    """Workers in the order of ranks, where they are, and their numbers on the lifeline."""

    workers: list[Any]
    places: list[Place]
    numbers: list[int]
    joined: bool

    def __str__(self) -> str:
        return ", ".join(f"{self.name(i)} (process {place.process})" for i, place in enumerate(self.places))

    def name(self, rank: int) -> str:
        return f"{f'rank {rank}' if self.joined else 'worker'} on {self.places[rank].address}"


def supervise(
    remaining: Callable[[], Order],
    shape: Shape,
    counts: Sequence[int],
    cluster: ClusterConfig,
    progress: Callable[[], object],
) -> None:
    """Run what remains until nothing does, through losses.

    Args:
        remaining: the order with the stages that are not finished now.
        counts: numbers of workers that will do, the wanted one first.
        progress: something that differs when work was finished since it was last called.

    Raises:
        UserError: a mistake that only a worker could see, no room on the cluster, or workers that were lost
            ``cluster.attempts`` times in a row without progress.
        RuntimeError: a worker failed with the same error twice, or in the last attempt; its traceback is the cause.
    """
    failures, state, last_error = 0, progress(), ""
    while (order := remaining()).stages:
        try:
            _attempt(order, shape, counts, cluster)
            return
        except Failure as failure:
            now = progress()
            failures, state = (failures + 1 if now == state else 1), now
            same = failure.error is not None and failure.line == last_error
            last_error = "" if failure.error is None else failure.line
            if failures >= cluster.attempts or (same and failures > 1):
                if failure.error is not None:
                    raise RuntimeError(f"cluster: {failure.line}") from failure.error
                raise UserError(
                    f"cluster: {failure.line}; {failures} failures in a row without progress (cluster.attempts); what "
                    "is finished is kept, run the same command again when the cluster is well"
                ) from failure
            say(f"cluster: {failure.line}; beginning again from what is finished")


def _attempt(order: Order, shape: Shape, counts: Sequence[int], cluster: ClusterConfig) -> None:
    import ray

    what = ", ".join(order.stages)
    wait = 60.0 * cluster.wait_minutes
    with reserved(shape, counts, cluster.on_loss, wait, what) as (group, count):
        lifeline = Lifeline(ray.util.get_node_ip_address())
        actors = _start(lifeline, group, shape, count, cluster.environment)
        try:
            running = _located(actors, group, order.joined)
            port = _get(running.workers[0].free_port.remote(), "rank 0")
            say(f"cluster: {what}: {running}")
            environments = rank_environment(running.places, port) if order.joined else [{}]
            for environment in environments:
                environment.update(cluster.environment)
            results = [
                worker.run.remote(environment, order)
                for worker, environment in zip(running.workers, environments, strict=True)
            ]
            _watch(results, running, lifeline)
        finally:
            for actor in actors:
                ray.kill(actor)
            lifeline.wait_until_gone(GONE_SECONDS)
            lifeline.close()


def _start(lifeline: Lifeline, group: Any, shape: Shape, count: int, environment: dict[str, str]) -> list[Any]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    resources = dict(shape.resources)
    options = {"num_cpus": resources.pop("CPU"), "num_gpus": resources.pop("GPU", 0), "resources": resources}
    if environment:  # before the process starts: some variables are read only then
        options["runtime_env"] = {"env_vars": environment}
    bundle_of = [index for index, size in enumerate(shape.bundles(count)) for _ in range(size)]
    return [
        ray.remote(Worker)
        .options(**options, scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle))
        .remote(lifeline.address, number)
        for number, bundle in enumerate(bundle_of)
    ]


def _located(actors: list[Any], group: Any, joined: bool) -> _Running:
    """The workers in the order of ranks: those of one node together, nodes in the order of bundles."""
    import ray
    from ray.util import placement_group_table

    waiting = [actor.where.remote() for actor in actors]
    refs, deadline = list(waiting), time.monotonic() + START_SECONDS
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
        for ref in ready:
            _get(ref, f"worker {refs.index(ref)}")
        if waiting and placement_group_table(group)["state"] != "CREATED":
            raise Failure("a node was lost while workers started")
        if time.monotonic() > deadline:
            raise Failure(f"{len(waiting)} workers did not start within {START_SECONDS:.0f} seconds")
    places = [_get(ref, f"worker {number}") for number, ref in enumerate(refs)]
    nodes = list(dict.fromkeys(place.node for place in places))
    order = sorted(range(len(actors)), key=lambda number: (nodes.index(places[number].node), number))
    return _Running([actors[i] for i in order], [places[i] for i in order], order, joined)


def _watch(results: list[Any], running: _Running, lifeline: Lifeline) -> None:
    """Wait for all ranks; the first that is lost, fails or names a mistake ends the attempt."""
    import ray

    waiting = list(results)
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
        for ref in ready:
            rank = results.index(ref)
            try:
                mistake = _get(ref, running.name(rank))
            except Failure as failure:
                raise _first_cause(failure, running, lifeline) from failure
            if mistake is not None:
                raise UserError(mistake)
        lost = _lost(running, lifeline)
        if lost and any(results[rank] in waiting for rank in lost):
            raise Failure(_in_words(lost, running))


def _first_cause(failure: Failure, running: _Running, lifeline: Lifeline) -> Failure:
    """When a rank is lost the others fail at what they were doing with it; the loss is what happened."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while failure.error is not None and time.monotonic() < deadline:
        if lost := _lost(running, lifeline):
            return Failure(_in_words(lost, running))
        time.sleep(POLL_SECONDS)
    return failure


def _lost(running: _Running, lifeline: Lifeline) -> list[int]:
    gone = lifeline.gone()
    return [rank for rank, number in enumerate(running.numbers) if number in gone]


def _in_words(lost: list[int], running: _Running) -> str:
    return " and ".join(running.name(rank) for rank in lost) + (" was lost" if len(lost) == 1 else " were lost")


def _get(ref: Any, who: str) -> Any:
    """The value of ``ref``; `Failure` where the actor raised or is no more."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise Failure(
            f"{who} failed: {type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}", error
        ) from error
    except OutOfMemoryError as error:
        raise Failure(f"{who} was ended by Ray: its node ran out of memory") from error
    except RayError as error:
        lines = str(error).strip().splitlines()
        why = lines[-1] if "creation task" in lines[0] else type(error).__name__
        raise Failure(f"{who} was lost ({why})") from error
