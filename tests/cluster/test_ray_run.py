"""Runs on a real three-node cluster: what they compute, where their processes are, what is refused."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.adapters.lora import read_adapter
from harness.cluster.connection import CLIENT_CRASH, connected
from harness.errors import UserError
from harness.files import read_json
from tests.cluster.nodes import HARNESS, WAIT_SECONDS, Driver, cluster_of
from tests.conftest import run_gang

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_cluster_at_a_time"), pytest.mark.timeout(900)]
Configured = Callable[..., Path]
# What drivers say where gRPC has crashed beside a fork of Ray Client's server, as it may on a busy machine.
CRASHES = (CLIENT_CRASH, "Client is shutting down.")


def largest_difference(left: Path, right: Path) -> float:
    """The largest relative distance between tensors of two adapters."""
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (left, right))
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).norm() / first[key].norm()) for key in first)


def test_gang_and_evaluation_on_different_nodes(
    three_nodes: Any, cluster_config: dict[str, Any], configured: Configured, tmp_path: Path
) -> None:
    """The adapter is that of the DeepSpeed launcher with the same seed; workers were where they were to be."""
    config = configured(cluster_config, "on-ray")
    driver = Driver(config, three_nodes.address, tmp_path / "log")
    # The parent of a worker is the raylet of its node.
    trained_on = [rank.ppid() for rank in driver.until(lambda: driver.workers("train"), "training gang")]
    evaluated_on = [worker.ppid() for worker in driver.until(lambda: driver.workers("eval"), "evaluation")]
    driver.finish()
    assert len(set(trained_on)) == 2 and len(evaluated_on) == 1
    assert not set(trained_on) & set(evaluated_on)

    run = tmp_path / "runs" / "on-ray"
    results = read_json(run / "eval" / "results.json")
    assert [model["name"] for model in results["models"]] == ["base", "final"]
    assert (run / "report.html").is_file()

    run_gang(configured(cluster_config, "by-launcher"), 2)
    assert largest_difference(tmp_path / "runs" / "by-launcher", run) <= 1e-5

    again = Driver(config, three_nodes.address, tmp_path / "again").finish()  # everything is finished
    assert "process" not in again


def test_layers_go_to_idle_nodes(
    three_nodes: Any, cluster_config: dict[str, Any], configured: Configured, tmp_path: Path
) -> None:
    """One rank trains, the whole cluster decomposes, and every tensor is the one that a single rank makes."""
    cluster_config["train"] |= {"ranks": 1, "max_steps": 2}
    cluster_config["eval"] = {}
    cluster_config["cluster"] = {"wait_minutes": 2, "gpus_per_worker": 0}
    log = Driver(configured(cluster_config, "wide"), three_nodes.address, tmp_path / "log").finish()
    assert "cluster: init: rank 0" in log and "rank 2 on" in log
    run_gang(configured(cluster_config, "alone"), 1)
    wide, alone = (read_adapter(tmp_path / "runs" / name / "init") for name in ("wide", "alone"))
    assert wide.keys() == alone.keys()
    for layer in alone:
        assert torch.equal(wide[layer].B, alone[layer].B)
        assert torch.equal(wide[layer].A, alone[layer].A)


def test_nodes_that_share_no_folder(
    three_nodes: Any, cluster_config: dict[str, Any], configured: Configured, tmp_path: Path
) -> None:
    """Every node works on a copy of its own; what comes out is what a shared folder holds."""
    cluster_config["eval"] = {}
    run_gang(configured(cluster_config, "shared"), 2)
    # One node holds both ranks of the stages whose ranks read each other's files, two those of training.
    cluster_config["cluster"] |= {"storage": f"file://{tmp_path}/storage", "init_workers": 1}
    cluster_config["train"]["ranks"] = 2
    Driver(configured(cluster_config, "stored"), three_nodes.address, tmp_path / "log").finish()
    copies = list((tmp_path / "runs" / ".nodes").iterdir())
    assert len(copies) == 2
    for run in (tmp_path / "runs", tmp_path / "storage"):
        assert largest_difference(tmp_path / "runs" / "shared", run / "stored") <= 1e-3
    assert (tmp_path / "storage" / "stored" / "report.html").is_file()


@pytest.mark.long  # a crash takes minutes to be noticed
def test_through_ray_client(cluster_config: dict[str, Any], configured: Configured, tmp_path: Path) -> None:
    """``ray://``: the driver runs on the cluster, and a mistake that it sees is one line here."""
    cluster_config["method"] = {"name": "lora", "rank": 4}
    cluster_config["train"] |= {"ranks": 1, "max_steps": 2}
    cluster_config["eval"] = {}
    config = configured(cluster_config, "client")
    with cluster_of([{"training": 1}]) as cluster:
        for left in (2, 1, 0):
            with client_server(cluster.address) as address:
                driver = Driver(config, address, tmp_path / f"log-{left}")
                code = driver.process.wait(2 * WAIT_SECONDS)
                refused = run_refused(config, address, "method.name=lara")
            if not left or not any(crash in text for crash in CRASHES for text in (driver.text(), refused)):
                break
        assert code == 0, driver.text()
        assert str(tmp_path / "runs" / "client" / "adapter") in driver.text()
        assert "method" in refused


@contextmanager
def client_server(cluster: str) -> Iterator[str]:
    """A server for clients outside the cluster; its address."""
    from harness.training.distributed import free_port

    port = free_port()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.util.client.server", "--host", "127.0.0.1", "--port", str(port)),
            *("--address", cluster, "--mode", "proxy"),
        ],
        env={**os.environ, "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "60"},  # 30 is little on a busy machine
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"ray://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("crashes", [2, 3])
def test_ray_client_is_tried_three_times(crashes: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its server may crash at the start; anything else is said at once."""
    import ray

    from harness.cluster import connection

    tries = []

    def init(address: str, **options: Any) -> None:
        tries.append(address)
        if len(tries) <= crashes:
            raise ConnectionAbortedError("Initialization failure from server:\nTraceback\nRuntimeError: It ended.")

    monkeypatch.setattr(connection, "check_reachable", lambda address: None)
    monkeypatch.setattr(ray, "init", init)
    if crashes == 2:
        with connected("ray://there:1"):
            pass
    else:
        expected = r"ray://there:1: Initialization failure from server: RuntimeError: It ended\."
        with pytest.raises(UserError, match=expected), connected("ray://there:1"):
            raise AssertionError
    assert tries == ["ray://there:1"] * 3
    assert capsys.readouterr().err.count("trying again") == 2


def run_refused(config: Path, address: str, *overrides: str) -> str:
    """The one line with which `harness run --cluster` ends with code 2."""
    done = subprocess.run(
        [HARNESS, "run", str(config), "--cluster", address, *overrides], capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_unreachable_clusters(cluster_config: dict[str, Any], configured: Configured) -> None:
    config = configured(cluster_config, "nowhere")
    with socket.create_server(("127.0.0.1", 0)) as listener:  # something that is not Ray
        not_ray = f"127.0.0.1:{listener.getsockname()[1]}"
        addresses = ("127.0.0.1:1", not_ray, f"ray://{not_ray}")
        with ThreadPoolExecutor() as at_once:
            for address, line in zip(addresses, at_once.map(partial(run_refused, config), addresses), strict=True):
                assert f"cluster: {address}: no Ray there" in line
    assert "allowed: local, auto, host:port" in run_refused(config, "head")


def test_no_room(cluster_config: dict[str, Any], configured: Configured) -> None:
    """A cluster of its own that cannot hold the workers is refused at once: nothing will join it."""
    line = run_refused(configured(cluster_config, "no-room"), "local")
    assert "2 × (1 CPU and 1 training) wanted" in line
