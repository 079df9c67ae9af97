"""How many workers nodes hold, which numbers of ranks will do, and what the launcher's variables are."""

from typing import Any

import pytest

from harness.cluster.placement import Shape, dividing, evaluation_shape, wanted_ranks, worker_shape
from harness.cluster.worker import Place, rank_environment
from harness.config import ClusterConfig, RunConfig, resolve

BIG, SMALL, PLAIN = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}
WORKER = {"CPU": 2.0, "GPU": 1.0}


def run_config(content: dict[str, Any], **train: Any) -> RunConfig:
    return resolve({**content, "train": {**content["train"], **train}})


@pytest.mark.parametrize(
    ("shape", "nodes", "largest"),
    [
        (Shape(WORKER), [BIG, SMALL, PLAIN], 6),
        (Shape(WORKER, "strict_pack"), [BIG, SMALL, PLAIN], 4),
        (Shape(WORKER, "spread"), [BIG, SMALL], 6),
        (Shape(WORKER, "strict_spread"), [BIG, SMALL, PLAIN], 2),
        (Shape(WORKER, per_node=4), [BIG, BIG], 8),
        (Shape(WORKER, per_node=4), [BIG, SMALL], 6),  # four and two
        (Shape(WORKER, per_node=3), [BIG, SMALL, SMALL], 5),  # three and two
        (Shape({"CPU": 1.0, "a100": 0.5}), [BIG, {"CPU": 8.0, "a100": 1.0}], 2),
        (Shape(WORKER), [PLAIN], 0),
        (Shape(WORKER), [], 0),
    ],
)
def test_room(shape: Shape, nodes: list[dict[str, float]], largest: int) -> None:
    assert max((count for count in range(1, 20) if shape.fit(count, nodes)), default=0) == largest


def test_bundles_of_nodes() -> None:
    assert Shape(WORKER).bundles(3) == [1, 1, 1]
    assert Shape(WORKER, per_node=4).bundles(10) == [4, 4, 2]


def test_numbers_of_ranks_divide_the_batch(base_config: dict[str, Any]) -> None:
    assert dividing(run_config(base_config, batch_size=12), 5) == [4, 3, 2, 1]
    assert dividing(run_config(base_config, batch_size=12, micro_batch_size=2), 6) == [6, 3, 2, 1]


def test_ranks_by_themselves(base_config: dict[str, Any]) -> None:
    """One per GPU, one per node without any; as many as divide the batch."""
    config = run_config(base_config, batch_size=12, ranks="auto")
    assert wanted_ranks(config, [BIG, SMALL, PLAIN]) == 6
    assert wanted_ranks(config, [BIG, {"CPU": 8.0, "GPU": 1.0}]) == 4
    assert wanted_ranks(config, [PLAIN, PLAIN]) == 2
    assert wanted_ranks(run_config(base_config, ranks=2), [BIG]) == 2


def test_shapes_from_the_configuration() -> None:
    cluster = ClusterConfig(cpus_per_worker=4, resources_per_worker={"a100": 0.1}, placement="spread")
    assert worker_shape(cluster, [BIG]) == Shape({"CPU": 4.0, "GPU": 1.0, "a100": 0.1}, "spread")
    assert worker_shape(cluster, [PLAIN]).resources == {"CPU": 4.0, "a100": 0.1}
    assert evaluation_shape(cluster, [BIG]).resources == {"CPU": 1.0, "GPU": 1.0}


def test_variables_of_the_launcher() -> None:
    places = [Place("a", "10.0.0.1", 1, ("2",)), Place("a", "10.0.0.1", 2, ("0",)), Place("b", "10.0.0.2", 3, ("1",))]
    first, second, third = rank_environment(places, 29500)
    assert {e["MASTER_ADDR"] + ":" + e["MASTER_PORT"] for e in (first, second, third)} == {"10.0.0.1:29500"}
    assert [e["RANK"] for e in (first, second, third)] == ["0", "1", "2"]
    assert [e["LOCAL_RANK"] for e in (first, second, third)] == ["0", "1", "0"]
    assert [e["CROSS_RANK"] for e in (first, second, third)] == ["0", "0", "1"]
    assert [e["LOCAL_SIZE"] for e in (first, second, third)] == ["2", "2", "1"]
    # A rank's own GPU is the one at its local rank.
    assert [e["CUDA_VISIBLE_DEVICES"] for e in (first, second, third)] == ["2,0", "2,0", "1"]
