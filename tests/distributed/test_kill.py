"""`kill -9` at random moments: a re-run finishes, and the adapter equals the undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.gangs import KILLS

pytestmark = pytest.mark.slow


def start(config: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "harness"), "run", str(config)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_supervisor(process: subprocess.Popen) -> None:
    """Kill `harness run` itself, not its ranks: they have to notice."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def test_kills_change_nothing(
    base_config: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    base_config["anchor"] = {"kl": 1.0, "prompts_per_step": 4}
    base_config["train"] |= {"max_steps": 60, "save_steps": 5, "preserve_loss_steps": 20}
    base_config["name"] = "undisturbed"
    began = time.monotonic()
    undisturbed = start(write_config(base_config))
    _, errors = undisturbed.communicate()
    assert undisturbed.returncode == 0, errors
    duration = time.monotonic() - began

    base_config["name"] = "killed"
    config = write_config(base_config)
    # Half of the moments fall anywhere in a run; half wait for the run directory to appear first, so that they hit
    # the stages and not the imports. A fixed seed makes the list of moments the same every time.
    moments = random.Random(0)
    for number in range(KILLS):
        process = start(config)
        if number % 2:
            time.sleep(moments.uniform(0, duration))
        else:
            target = tmp_path / "runs" / "killed" / moments.choice(["init", "checkpoints", "adapter", "merged"])
            deadline = time.monotonic() + 2 * duration
            while process.poll() is None and not target.exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 1))
        kill_supervisor(process)
    last = start(config)
    _, errors = last.communicate()
    assert last.returncode == 0, errors

    runs = tmp_path / "runs"
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        left, right = load_file(runs / "undisturbed" / file), load_file(runs / "killed" / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    steps = [
        [line.split('"seconds"')[0] for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("undisturbed", "killed")
    ]
    assert steps[0] == steps[1]
