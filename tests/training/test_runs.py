"""Whole training runs: β = 0 changes nothing, and a run goes on under other ranks and another ZeRO stage."""

import copy
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import gang_command, run_gang
from tests.gangs import gang_environment, run_in_gang

pytestmark = pytest.mark.slow
Tensors = dict[str, torch.Tensor]


def trained(run: Path, step: int) -> Tensors:
    return load_file(run / "checkpoints" / f"step-{step}" / "trained" / "model.safetensors")


def largest_difference(left: Tensors, right: Tensors) -> float:
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).norm() / left[key].norm()) for key in left)


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def alone(content: dict[str, Any], folder: Path, name: str, **blocks: Any) -> Path:
    """Calibrate → init → train in one process without a launcher; the run directory."""
    content = {**copy.deepcopy(content), "name": name, **blocks}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    run_in_gang(1, "--config", str(path), "--stages", "calibrate,init,train")
    return Path(content["output_dir"]) / name


@pytest.mark.parametrize("method", ["lora", "kpm"])
def test_anchor_of_weight_0_is_the_method_alone(base_config: dict[str, Any], tmp_path: Path, method: str) -> None:
    if method == "lora":
        base_config["method"] = {"name": "lora", "rank": 8}
    base_config["train"] |= {"max_steps": 4, "save_steps": 4, "log_steps": 1}
    without = alone(base_config, tmp_path, "without")
    zero = alone(base_config, tmp_path, "zero", anchor={"kl": 0.0})
    assert equal(trained(without, 4), trained(zero, 4))
    assert "anchor_kl" not in (zero / "metrics.jsonl").read_text()
    if method == "kpm":  # equality says something: an anchor of weight 1 is another run
        some = alone(base_config, tmp_path, "some", anchor={"kl": 1.0})
        assert not equal(trained(without, 4), trained(some, 4))
        assert "anchor_kl" in (some / "metrics.jsonl").read_text()


def kill_after(config: Path, ranks: int, checkpoint: Path, *overrides: str) -> None:
    """Start a gang and kill all of it with SIGKILL once ``checkpoint`` is there."""
    process = subprocess.Popen(
        gang_command(config, ranks, *overrides),
        env=gang_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not checkpoint.exists():
        assert process.poll() is None, "the gang ended before it left the checkpoint"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def interrupted(
    tmp_path_factory: pytest.TempPathFactory, random_base: Path, data_files: dict[str, Path]
) -> dict[str, Path]:
    """A run of 20 steps under ZeRO-2 on two ranks, whole; and one that was killed after step 10."""
    folder = tmp_path_factory.mktemp("resume")
    content = {
        "model": {"path": str(random_base), "dtype": "float32"},
        "data": {
            "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a"},
            "preserve": {"path": str(data_files["preserve"]), "prompt": "q", "samples": 32},
            "max_length": 64,
        },
        "method": {"name": "corda", "mode": "kpm", "rank": 8},
        "anchor": {"kl": 1.0, "prompts_per_step": 5},
        "train": {
            "deepspeed": "ds_configs/zero2.json",
            "max_steps": 20,
            "batch_size": 12,
            "learning_rate": 1.0e-3,
            "save_steps": 10,
            "log_steps": 5,
        },
    }
    paths = {}
    for name in ("undisturbed", "killed"):
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump({**content, "name": "run", "output_dir": str(folder / name)}))
    run_gang(paths["undisturbed"], 2)
    kill_after(paths["killed"], 2, folder / "killed" / "run" / "checkpoints" / "step-10")
    # Whatever the gang did between publishing step 10 and dying: only step 10 is there to go on from.
    for later in (folder / "killed" / "run" / "checkpoints").glob("*20*"):
        shutil.rmtree(later)
    assert (folder / "killed" / "run" / "checkpoints" / "step-10" / "optimizer").is_dir()
    return {"undisturbed": folder / "undisturbed" / "run", "killed": folder / "killed", "folder": folder}


def go_on(interrupted: dict[str, Path], name: str, ranks: int, zero: int) -> Path:
    """A copy of the killed run, finished on ``ranks`` ranks under ZeRO ``zero``; its run directory."""
    folder = interrupted["folder"] / name
    shutil.copytree(interrupted["killed"], folder)
    content = yaml.safe_load((interrupted["folder"] / "killed.yaml").read_text())
    config = interrupted["folder"] / f"{name}.yaml"
    config.write_text(yaml.safe_dump({**content, "output_dir": str(folder)}))
    run_gang(config, ranks, f"train.deepspeed=ds_configs/zero{zero}.json")
    return folder / "run"


def test_resumed_in_the_same_setting_is_equal_bit_for_bit(interrupted: dict[str, Path]) -> None:
    undisturbed, resumed = interrupted["undisturbed"], go_on(interrupted, "same", 2, 2)
    assert equal(trained(undisturbed, 10), trained(resumed, 10))
    assert equal(trained(undisturbed, 20), trained(resumed, 20))
    moments = [
        load_file(run / "checkpoints" / "step-20" / "optimizer" / "model.safetensors") for run in (undisturbed, resumed)
    ]
    assert equal(*moments)


@pytest.mark.parametrize(("ranks", "zero"), [(1, 3), (3, 3)])
def test_resumed_in_another_setting(interrupted: dict[str, Path], ranks: int, zero: int) -> None:
    """On three ranks ZeRO-3 pads the last part of every tensor."""
    resumed = go_on(interrupted, f"{ranks}-zero{zero}", ranks, zero)
    undisturbed = interrupted["undisturbed"]
    assert largest_difference(trained(undisturbed, 20), trained(resumed, 20)) <= 1e-3
    # Something was learned between the checkpoint and the end, so agreement is not that of standing still.
    assert largest_difference(trained(undisturbed, 10), trained(undisturbed, 20)) > 1e-2
