"""Where workers go: how many a cluster has room for, and a placement group that holds them together."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from harness.config import ClusterConfig, RunConfig
from harness.console import say
from harness.errors import UserError

ROOM_POLL_SECONDS = 1.0
RELEASE_SECONDS = 30.0  # what workers held that have just ended is free again by then


@dataclass(frozen=True)
class Shape:
    """What one worker takes of a node, and how workers stand to each other.

    Attributes:
        resources: of one worker, by Ray's names (``CPU``, ``GPU``, your own).
        strategy: ``pack``, ``strict_pack``, ``spread`` or ``strict_spread``; of single workers, or where
            ``per_node`` is given of groups of so many, each on a node of its own.
    """

    resources: Mapping[str, float]
    strategy: str = "pack"
    per_node: int | None = None

    def bundles(self, workers: int) -> list[int]:
        """Workers by bundle; the workers of a bundle share a node."""
        size = self.per_node or 1
        full, rest = divmod(workers, size)
        return [size] * full + ([rest] if rest else [])

    def ray_strategy(self) -> str:
        """Ray's name of the strategy."""
        return "STRICT_SPREAD" if self.per_node else self.strategy.upper()

    def rooms(self, nodes: Sequence[Mapping[str, float]]) -> list[int]:
        """How many workers each of ``nodes`` (resources by name) holds when it does nothing else."""
        return [
            min(int((node.get(name, 0.0) + 1e-6) / amount) for name, amount in self.resources.items()) for node in nodes
        ]

    def fit(self, workers: int, nodes: Sequence[Mapping[str, float]]) -> bool:
        """Whether ``nodes`` hold so many workers when they do nothing else."""
        rooms, strategy = self.rooms(nodes), self.ray_strategy()
        if strategy == "STRICT_SPREAD":
            wanted = sorted(self.bundles(workers), reverse=True)
            free = sorted(rooms, reverse=True)
            return len(wanted) <= len(free) and all(size <= room for size, room in zip(wanted, free, strict=False))
        return workers <= (max(rooms, default=0) if strategy == "STRICT_PACK" else sum(rooms))

    def __str__(self) -> str:
        return " and ".join(f"{amount:g} {name}" for name, amount in self.resources.items())


def worker_shape(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> Shape:
    """The shape of a rank of the gang."""
    gpus = _gpus(cluster.gpus_per_worker, nodes)
    resources = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": float(gpus)} if gpus else {})
    return Shape(resources | cluster.resources_per_worker, cluster.placement, cluster.ranks_per_node)


def evaluation_shape(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> Shape:
    """The shape of the process that evaluates."""
    options = cluster.evaluation
    gpus = _gpus(options.gpus, nodes)
    return Shape({"CPU": float(options.cpus)} | ({"GPU": float(gpus)} if gpus else {}) | options.resources)


def wanted_ranks(config: RunConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """``train.ranks``; with ``auto`` one per GPU of the cluster, one per node on a cluster without."""
    if config.train.ranks != "auto":
        return config.train.ranks
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    per_worker = _gpus(config.cluster.gpus_per_worker, nodes)
    return max(dividing(config, max(1, gpus // per_worker if per_worker else len(nodes))))


def dividing(config: RunConfig, ranks: int) -> list[int]:
    """The numbers of ranks up to ``ranks`` that divide the global batch evenly, largest first."""
    micro = config.train.micro_batch_size or 1
    return [count for count in range(ranks, 0, -1) if config.train.batch_size % (count * micro) == 0]


def idle_room(shape: Shape) -> int:
    """How many workers of ``shape`` the resources that nobody uses now come to, nodes taken together."""
    import ray

    available = ray.available_resources()
    return max(0, shape.rooms([available])[0])


def live_nodes() -> list[dict[str, float]]:
    """The resources of every node that is there, used or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def reserved(
    shape: Shape, counts: Sequence[int], on_loss: str, wait_seconds: float, what: str
) -> Iterator[tuple[Any, int]]:
    """A placement group for as many workers as there can be, and their number.

    Args:
        counts: numbers of workers that will do, the wanted one first, then smaller ones.
        on_loss: ``continue`` takes a smaller number where the nodes that are there could not hold the wanted one even
            if they were idle; ``wait`` never does.
        wait_seconds: how long to wait for room.
        what: for messages.

    Raises:
        UserError: there was no room in that time.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    deadline, said = time.monotonic() + wait_seconds, ""
    while True:
        nodes = live_nodes()
        allowed = counts if on_loss == "continue" else counts[:1]
        count = next((count for count in allowed if shape.fit(count, nodes)), 0)
        if count:
            sizes = shape.bundles(count)
            bundles = [{name: amount * size for name, amount in shape.resources.items()} for size in sizes]
            group = placement_group(bundles, strategy=shape.ray_strategy())
            began = time.monotonic()
            try:
                while not group.wait(ROOM_POLL_SECONDS):
                    waited = time.monotonic() - began
                    if not shape.fit(count, live_nodes()) or (waited > RELEASE_SECONDS and time.monotonic() > deadline):
                        break
                    if waited > 5 and said != "busy":
                        said = "busy"
                        say(f"cluster: {what}: waiting for {count} × ({shape}) to become free")
                else:
                    if count < counts[0]:
                        say(f"cluster: {what}: room for {count} workers of {counts[0]}, going on with those")
                    yield group, count
                    return
            finally:
                if ray.is_initialized():
                    remove_placement_group(group)
        elif said != "missing":
            said = "missing"
            say(f"cluster: {what}: {counts[0]} × ({shape}) wanted, {_held(shape, nodes)}; waiting for nodes")
        if time.monotonic() > deadline:
            raise UserError(
                f"cluster: {what}: {counts[0]} × ({shape}) wanted, {_held(shape, live_nodes())}, after a wait of "
                f"{wait_seconds / 60:g} minutes; add nodes, ask for less, or set cluster.on_loss: continue"
            )
        time.sleep(ROOM_POLL_SECONDS)


def _held(shape: Shape, nodes: Sequence[Mapping[str, float]]) -> str:
    return f"and the {len(nodes)} nodes that are there hold {sum(shape.rooms(nodes))} of them at most"


def _gpus(wanted: int | str, nodes: Sequence[Mapping[str, float]]) -> int:
    return int(any(node.get("GPU", 0) for node in nodes)) if wanted == "auto" else int(wanted)
