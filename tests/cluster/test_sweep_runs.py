"""Sweeps of real runs: killed and continued, statistics and the base's scores made once, failures left out."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness.cluster.sweep_process import HEADER
from tests.gangs import KILLS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_cluster_at_a_time"), pytest.mark.timeout(1800)]
HARNESS = str(Path(sys.executable).parent / "harness")
WAIT_SECONDS = 900.0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One thread, and a cache of the test's own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PALIMPSEST_CACHE": str(tmp_path / "cache")}


def start(sweep: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    with sweep.with_suffix(".out").open("a") as output:
        return subprocess.Popen(
            [HARNESS, "sweep", str(sweep), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def said(sweep: Path) -> str:
    return sweep.with_suffix(".out").read_text()


def until(process: subprocess.Popen[str], sweep: Path, condition: Callable[[], bool]) -> None:
    """Wait for ``condition`` while the sweep runs."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, said(sweep)
        time.sleep(0.05)


def no_process_is_left(folder: Path, seconds: float = 180.0) -> bool:
    """Whether everything that works below ``folder`` ends in time."""

    def alive() -> list[int]:
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = " ".join(process.info["cmdline"] or ())
            if f"{folder}/" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        return found

    deadline = time.monotonic() + seconds
    while alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not alive()


def recorded(run: Path, stage: str) -> bool:
    path = run / "stages" / f"{stage}.json"
    return path.is_file() and json.loads(path.read_text())["finished"]


def test_a_killed_sweep_goes_on(
    base_config: dict[str, Any], local_tasks: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    """The driver dies by SIGKILL and by SIGINT; what was made is kept, and what is shared is made once."""
    base_config["train"] |= {"max_steps": 12, "save_steps": 6}
    base_config["eval"] = {"backend": "hf", "knowledge": ["words_choice"], "task": ["words_next"], "limit": 4}
    base_config["eval"] |= {"include_path": str(local_tasks.include_path), "data_dir": str(local_tasks.data_dir)}
    sweep, out = tmp_path / "sweep.yaml", tmp_path / "out"
    content = {
        "base": base_config,
        "grid": {"train.learning_rate": [{"label": "fast", "value": 2e-3}, {"label": "slow", "value": 5e-4}]},
        "seeds": [0, 1],
        "baseline": "slow",
    }
    sweep.write_text(yaml.safe_dump(content))
    cells = [out / "cells" / f"{label}-seed{seed}" for label in ("fast", "slow") for seed in (0, 1)]

    moments = random.Random(0)
    for number in range(KILLS - 1):  # the first hits training, the others fall anywhere
        killed = start(sweep, environment, "--out", str(out))
        if number == 0:
            until(killed, sweep, lambda: any((cell / "checkpoints" / "step-6").exists() for cell in cells))
        else:
            time.sleep(moments.uniform(0, 12))  # so short that the sweep does not come to its end
        killed.kill()
        killed.wait()
        assert no_process_is_left(out)

    stopped = start(sweep, environment, "--out", str(out))
    until(stopped, sweep, lambda: any(recorded(cell, "report") for cell in cells))
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(WAIT_SECONDS) != 0
    assert no_process_is_left(out) and "the same command goes on from here" in said(sweep)
    kept = {
        file: file.stat().st_mtime_ns
        for cell in cells
        if recorded(cell, "report")
        for file in cell.rglob("*")
        if file.is_file() and file.name != ".lock"
    }

    last = start(sweep, environment, "--out", str(out))
    assert last.wait(WAIT_SECONDS) == 0, said(sweep)
    assert kept and all(file.stat().st_mtime_ns == at for file, at in kept.items())
    assert all(recorded(cell, "report") for cell in cells)
    with (out / "sweep.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["run"], row["status"]) for row in table] == [(cell.name, "finished") for cell in cells]
    for row, cell in zip(table, cells, strict=True):
        assert float(row["KT"]) == json.loads((cell / "eval" / "results.json").read_text())["KT"]
    assert (out / "sweep.html").is_file() and "Differences from slow" in (out / "sweep.md").read_text()

    logs = "".join(path.read_text() for path in (out / "logs").iterdir()).splitlines()
    calibrated = [line for line in logs if line.startswith("calibrate: ")]
    collected = [line for line in calibrated if "from the cache" not in line]
    assert len(collected) == 2 and len(calibrated) >= 4, calibrated  # once for each seed, taken by the other
    base = [line for line in logs if line.startswith("eval: base:")]
    assert sum("known from an earlier evaluation" not in line for line in base) == 1, base
    assert "whose calibrate and init others wait for" in (out / "sweep.log").read_text()

    # A cell is an ordinary run: alone, undisturbed and without a cache it comes to the same adapter.
    alone = base_config | {"name": "alone", "init": {"cache": False}, "eval": {}}
    alone["train"] = base_config["train"] | {"learning_rate": 2e-3, "seed": 1}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    subprocess.run([HARNESS, "run", str(tmp_path / "alone.yaml")], env=environment, check=True, capture_output=True)
    file = "adapter/adapter_model.safetensors"
    left, right = load_file(tmp_path / "runs" / "alone" / file), load_file(cells[1] / file)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)

    again = start(sweep, environment, "--out", str(out), "--table")
    assert again.wait(WAIT_SECONDS) == 0, said(sweep)


def test_a_failed_cell_is_tried_again_and_left_out(
    base_config: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    """One after the other, without Ray: a row without tokens is seen by a rank only, and stops its own cell alone."""
    (tmp_path / "bad.jsonl").write_text('{"q": ""}\n' * 8)
    base_config["train"] |= {"max_steps": 4, "save_steps": 4}
    sweep, out = tmp_path / "sweep.yaml", tmp_path / "out"
    bad = {"label": "bad", "data.preserve": {"path": str(tmp_path / "bad.jsonl"), "prompt": "q", "samples": 4}}
    content = {"base": base_config, "list": [bad, {"label": "good", "method": {"name": "lora", "rank": 4}}]}
    sweep.write_text(yaml.safe_dump(content))
    done = start(sweep, environment, "--out", str(out), "--cluster", "none")
    assert done.wait(WAIT_SECONDS) == 1, said(sweep)
    cells = {cell["label"]: cell for cell in json.loads((out / "sweep.json").read_text())["cells"]}
    assert (cells["good"]["status"], cells["bad"]["status"]) == ("finished", "failed")
    assert cells["bad"]["error"].startswith("error: data.preserve: 4 of 4 sampled rows have no tokens")
    assert (out / "logs" / "bad-seed0.log").read_text().count(HEADER) == 2
    text = (out / "sweep.md").read_text()
    assert "have no tokens" in text and "1 of 2 runs failed" in text
