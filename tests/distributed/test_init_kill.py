"""`kill -9` of any rank at random moments of `init`: a re-run finishes it, and nothing finished is done twice."""

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
from safetensors.torch import load_file

from tests.gangs import KILLS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wide_base(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `random_base`, with more and wider layers, so that `init` takes long enough to be hit."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    AutoTokenizer.from_pretrained(random_base).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(random_base)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 192, 384, 4
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 48
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def start(config: Path, stage: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).parent / "harness"), stage, str(config)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(config: Path, stage: str) -> str:
    process = start(config, stage)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks that `harness` has started, through the launcher."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "RANK" in child.environ() and "harness.gang" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def finished_layers(run: Path) -> dict[str, tuple[int, int]]:
    """Every layer's file in the staging folder with what a second writing of it would change."""
    folder = run / ".init.staging" / "layers" / "adapters"
    found = {}
    for file in folder.glob("*.safetensors"):
        status = file.stat()
        found[file.name] = (status.st_ino, status.st_mtime_ns)
    return found


def test_kills_of_ranks(
    base_config: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], wide_base: Path, tmp_path: Path
) -> None:
    base_config["model"]["path"] = str(wide_base)
    base_config["method"] = {"name": "corda", "mode": "kpm", "rank": 8, "rounds": 2, "dynamic_rank": True}
    base_config["init"] = {"cache": False}
    base_config["train"]["ranks"] = 2
    base_config["name"] = "undisturbed"
    undisturbed = write_config(base_config)
    finish(undisturbed, "calibrate")
    finish(undisturbed, "init")
    base_config["name"] = "killed"
    config, run = write_config(base_config), tmp_path / "runs" / "killed"
    finish(config, "calibrate")
    whole = 28

    moments, layers = random.Random(0), finished_layers(run)
    for number in range(KILLS):
        # Three kills of ten fall anywhere; the others wait until so many more layers are finished.
        wanted = len(layers) + moments.randint(1, 3) if number % 3 else 0
        process = start(config, "init")
        ranks: list[psutil.Process] = []
        while process.poll() is None and len(ranks) < 2:
            ranks = ranks_of(process)
            time.sleep(0.05)
        if not wanted:
            time.sleep(moments.uniform(0, 6))
        while process.poll() is None and wanted and len(finished_layers(run)) < min(wanted, whole):
            time.sleep(0.001)
        if process.poll() is None:
            try:
                os.kill(moments.choice(ranks).pid, signal.SIGKILL)
            except ProcessLookupError:
                assert process.wait() == 0
        process.communicate()
        kept, layers = layers, finished_layers(run)
        if (run / "init").exists():  # a moment after everything: begin again, or there is nothing left to kill
            assert process.returncode == 0
            for leaving in ("init", "stages/init.json"):
                subprocess.run(["rm", "-rf", str(run / leaving)], check=True)
            layers = {}
            continue
        assert process.returncode not in (0, None)
        assert kept.items() <= layers.items()  # none is gone, none was written again
    errors = finish(config, "init")
    if layers:
        assert f"init: of {whole} layers {len(layers)} were there from an earlier attempt" in errors
    left, right = (
        load_file(tmp_path / "runs" / name / "init" / "adapter_model.safetensors") for name in ("undisturbed", "killed")
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
