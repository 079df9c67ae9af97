"""One worker: an actor in a process of its own that is a rank of a gang, or evaluates alone."""

import os
import socket
from contextlib import nullcontext
from dataclasses import dataclass

from harness.cluster.lifeline import hold
from harness.cluster.storage import Storage
from harness.config import RunConfig
from harness.errors import mendable

LOCK_WAIT_SECONDS = 150.0  # NFS gives up the locks of a node that went silent after 90


@dataclass(frozen=True)
class Place:
    """Where a worker is: Ray's id of its node, the node's address, its process, the GPUs it was given."""

    node: str
    address: str
    process: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Order:
    """What workers are to run: ``stages`` of ``config``; ``joined`` as ranks of one gang, else alone.

    ``storage`` is the URL of a run directory that nodes do not share.
    """

    config: RunConfig
    stages: tuple[str, ...]
    joined: bool
    storage: str | None = None


class Worker:
    """Ray makes it an actor. It ends with the driver."""

    def __init__(self, lifeline: tuple[str, int, str], number: int) -> None:
        hold(lifeline, number)

    def where(self) -> Place:
        import ray

        context = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", []))
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), gpus)

    def free_port(self) -> int:
        """A port of this node for the ranks to meet at, if this is rank 0."""
        with socket.create_server(("", 0)) as probe:
            return probe.getsockname()[1]

    def run(self, environment: dict[str, str], order: Order) -> str | None:
        """Run the stages with the launcher's variables in ``environment``; a line that a user can act on, or None."""
        # Nothing that imports torch comes before the variables: they say which GPUs it sees.
        os.environ.update(environment)
        from harness.gang import quiet_libraries
        from harness.pipeline import LOCK_WAIT

        os.environ.setdefault(LOCK_WAIT, str(LOCK_WAIT_SECONDS))
        quiet_libraries()
        try:
            if order.storage is None:
                _run(order.config, order)
            else:
                _run_on_copy(order, order.storage)
        except Exception as error:
            if (line := mendable(error)) is None:
                raise
            return str(line)
        return None


def _run(config: RunConfig, order: Order) -> None:
    from harness.gang import run_rank
    from harness.pipeline import run_stages

    if order.joined:
        run_rank(config, list(order.stages))
    else:
        run_stages(config, list(order.stages))


def _run_on_copy(order: Order, url: str) -> None:
    """Run on this node's copy of the run directory; the main rank hands on what came of it."""
    import ray

    from harness.console import is_main_process

    node = ray.get_runtime_context().get_node_id()
    folder = order.config.run_directory.parent / ".nodes" / node
    config = order.config.model_copy(update={"output_dir": str(folder)})
    storage = Storage(url, config.run_directory)
    storage.pull()
    main = is_main_process()
    with storage.checkpoints_handed_on() if main else nullcontext():
        _run(config, order)
    if main:
        storage.push()


def rank_environment(places: list[Place], port: int) -> list[dict[str, str]]:
    """The variables that the DeepSpeed launcher would set, for workers in the order of ranks.

    Workers of one node must stand together. Each sees the GPUs of all ranks of its node, its own at the index of its
    local rank, as under the launcher.
    """
    nodes = list(dict.fromkeys(place.node for place in places))
    environments = []
    for rank, place in enumerate(places):
        local = [other for other in places if other.node == place.node]
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank - places.index(local[0]),
            "WORLD_SIZE": len(places),
            "LOCAL_SIZE": len(local),
            "CROSS_RANK": nodes.index(place.node),
            "CROSS_SIZE": len(nodes),
            "MASTER_ADDR": places[0].address,
            "MASTER_PORT": port,
        }
        if place.gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(other.gpus[0] for other in local)
        environments.append({name: str(value) for name, value in own.items()})
    return environments
