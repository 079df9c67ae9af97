"""`kill -9` of workers, nodes and drivers: runs end, and with what the undisturbed one gave."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cluster.nodes import Driver, add_node, cluster_of, gone, steps
from tests.gangs import KILLS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_cluster_at_a_time"),
    pytest.mark.timeout(600 + 120 * KILLS),
]
Configured = Callable[..., Path]
Undisturbed = Callable[[Any, dict[str, Any]], tuple[Path, float]]
TRAINING = {"training": 1.0}


@pytest.fixture
def fault_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
    """Long enough to be hit so many times, with something new between two hits."""
    cluster_config["anchor"] = {"kl": 1.0, "prompts_per_step": 4}
    cluster_config["train"] |= {"max_steps": 8 * (KILLS + 4), "save_steps": 4, "log_steps": 4}
    cluster_config["eval"] = {}
    return cluster_config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The run that others are compared with, made once, on the cluster of the test that comes first; its seconds."""
    folder, seconds = tmp_path_factory.mktemp("undisturbed"), []

    def made(cluster: Any, content: dict[str, Any]) -> tuple[Path, float]:
        if not seconds:
            config = folder / "undisturbed.yaml"
            config.write_text(yaml.safe_dump({**content, "name": "undisturbed", "output_dir": str(folder)}))
            began = time.monotonic()
            Driver(config, cluster.address, folder / "log").finish()
            seconds.append(time.monotonic() - began)
        return folder / "undisturbed", seconds[0]

    return made


def assert_equal_runs(left: Path, right: Path) -> None:
    """The same adapter, merged model and metrics, bit for bit but for the times."""
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        first, second = load_file(left / file), load_file(right / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (left, right)
    ]
    assert lines[0] == lines[1]


def next_checkpoint(driver: Driver, run: Path, last: int) -> int | None:
    """Wait until there is a checkpoint after step ``last``, and a gang that goes on from it; its step."""
    found = driver.until(lambda: [step for step in steps(run) if step > last] or None, "next checkpoint")
    return None if found is None else found[-1]


def test_a_worker_is_killed(
    fault_config: dict[str, Any], configured: Configured, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    moments, runs = random.Random(0), tmp_path / "runs"
    with cluster_of([TRAINING, TRAINING]) as cluster:
        whole, _ = undisturbed(cluster, fault_config)
        driver = Driver(configured(fault_config, "killed"), cluster.address, tmp_path / "killed.log")
        hits, last = 0, 0
        while hits < KILLS and (step := next_checkpoint(driver, runs / "killed", last)) is not None:
            time.sleep(moments.uniform(0, 0.5))
            workers = driver.workers("train")
            if len(workers) < 2:  # the gang of the last checkpoint is ending
                continue
            os.kill(moments.choice(workers).pid, signal.SIGKILL)
            assert gone(workers)  # the others are ended too
            hits, last = hits + 1, step
        log = driver.finish()
    assert hits == KILLS and log.count("beginning again") >= KILLS
    assert_equal_runs(whole, runs / "killed")


def test_a_node_is_killed(
    fault_config: dict[str, Any], configured: Configured, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Three nodes for two ranks: the third takes over, and a new one joins after each loss."""
    moments, runs = random.Random(1), tmp_path / "runs"
    with cluster_of([{}, TRAINING, TRAINING, TRAINING]) as cluster:
        whole, _ = undisturbed(cluster, fault_config)
        driver = Driver(configured(fault_config, "killed"), cluster.address, tmp_path / "killed.log")
        hits, last = 0, 0
        while hits < KILLS and (step := next_checkpoint(driver, runs / "killed", last)) is not None:
            workers = driver.workers("train")
            if len(workers) < 2:
                continue
            raylet = moments.choice(workers).ppid()
            node = next(n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet)
            cluster.remove_node(node, allow_graceful=False)
            assert gone(workers)
            add_node(cluster, TRAINING)
            hits, last = hits + 1, step
        log = driver.finish()
    assert hits == KILLS and log.count("beginning again") >= KILLS
    assert_equal_runs(whole, runs / "killed")


def test_the_driver_is_killed(
    fault_config: dict[str, Any], configured: Configured, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Its workers end by themselves, and the same command goes on: half of the hits fall anywhere, half in training."""
    moments, runs = random.Random(2), tmp_path / "runs"
    with cluster_of([TRAINING, TRAINING]) as cluster:
        whole, duration = undisturbed(cluster, fault_config)
        last = 0
        config = configured(fault_config, "killed")
        for number in range(KILLS):
            driver = Driver(config, cluster.address, tmp_path / f"killed-{number}.log")
            if number % 2:
                time.sleep(moments.uniform(0, duration))
            else:
                last = next_checkpoint(driver, runs / "killed", last) or last
            workers = driver.workers("train") or driver.workers("export")
            driver.process.kill()
            driver.process.wait()
            assert gone(workers)
        Driver(config, cluster.address, tmp_path / "killed.log").finish()
    assert_equal_runs(whole, runs / "killed")


def test_the_head_is_killed(
    fault_config: dict[str, Any],
    configured: Configured,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole cluster goes with its head; a new one takes the run up."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "10")  # Ray gives a lost head a minute
    runs, config = tmp_path / "runs", configured(fault_config, "killed")
    with cluster_of([TRAINING, TRAINING]) as cluster:
        driver = Driver(config, cluster.address, tmp_path / "killed.log")
        assert next_checkpoint(driver, runs / "killed", 0)
        workers = driver.workers("train")
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        driver.process.wait(120)
        assert driver.process.returncode != 0
        assert gone(workers)
    with cluster_of([TRAINING, TRAINING]) as cluster:
        whole, _ = undisturbed(cluster, fault_config)
        Driver(config, cluster.address, tmp_path / "again.log").finish()
    assert_equal_runs(whole, runs / "killed")


def test_fewer_ranks_or_waiting(fault_config: dict[str, Any], configured: Configured, tmp_path: Path) -> None:
    """A node that does not come back: ``continue`` goes on with one rank, ``wait`` waits and then says why it ends."""
    runs, logs = tmp_path / "runs", {}
    fault_config["train"] |= {"max_steps": 48}
    for choice in ("continue", "wait"):
        fault_config["cluster"] |= {"on_loss": choice, "wait_minutes": 0.25}
        with cluster_of([TRAINING, TRAINING]) as cluster:
            driver = Driver(configured(fault_config, choice), cluster.address, tmp_path / choice)
            assert next_checkpoint(driver, runs / choice, 0)
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            logs[choice] = driver.process.wait(300), driver.text()
    code, log = logs["continue"]
    assert code == 0 and "room for 1 workers of 2, going on with those" in log
    assert (runs / "continue" / "adapter").is_dir()
    code, log = logs["wait"]
    assert code == 2 and "add nodes, ask for less, or set cluster.on_loss: continue" in log
