"""Runs whose optimiser has several groups, or whose adapter is half frozen: checkpoints, resuming, exports."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness.adapters.lora import read_adapter
from harness.files import read_json
from tests.conftest import run_gang
from tests.training.test_runs import equal, kill_after, trained

pytestmark = pytest.mark.slow
METHODS: dict[str, dict[str, Any]] = {
    "lora_plus": {"name": "lora_plus", "rank": 8, "ratio": 4.0},
    "lora_fa": {"name": "lora_fa", "rank": 8},
    "lora_null v2": {"name": "lora_null", "rank": 8, "freeze_a": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed(base_config: dict[str, Any], tmp_path: Path, method: str) -> None:
    """Under the anchor, which switches adapters off at every step, and on one rank."""
    base_config |= {"method": METHODS[method], "anchor": {"kl": 1.0, "prompts_per_step": 2}}
    base_config["train"] |= {"max_steps": 4, "save_steps": 2, "log_steps": 1, "weight_decay": 0.1}
    runs = {}
    for name in ("undisturbed", "killed"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**base_config, "output_dir": str(tmp_path / name)}))
        runs[name] = (path, tmp_path / name / "run")
    run_gang(runs["undisturbed"][0], 1)
    path, run = runs["killed"]
    kill_after(path, 1, run / "checkpoints" / "step-2")
    for later in (run / "checkpoints").glob("*4*"):
        shutil.rmtree(later)
    run_gang(path, 1)

    undisturbed = runs["undisturbed"][1]
    assert equal(trained(undisturbed, 2), trained(run, 2))
    assert equal(trained(undisturbed, 4), trained(run, 4))
    assert not equal(trained(run, 2), trained(run, 4))
    factors = {"lora_A", "lora_B"} if method == "lora_plus" else {"lora_B"}
    assert {name.rsplit(".", 2)[1] for name in trained(run, 4)} == factors
    rates = read_json(run / "checkpoints" / "step-2" / "scheduler.json")["learning_rates"]
    assert len(rates) == len(factors)
    if method == "lora_plus":
        assert rates[1] == pytest.approx(4 * rates[0])
    check_frozen(run, method)


def check_frozen(run: Path, method: str) -> None:
    """A that was not trained is exported as it was initialised."""
    initial, exported = read_adapter(run / "init"), read_adapter(run / "adapter")
    same = [torch.equal(exported[name].A, factor.A) for name, factor in initial.items()]
    assert all(same) if method != "lora_plus" else not any(same)
    moments = load_file(run / "checkpoints" / "step-4" / "optimizer" / "model.safetensors")
    assert all(moment.any() for moment in moments.values())
