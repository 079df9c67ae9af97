"""LLaVA on real ranks: images and text mixed, so that ranks often have no image while others have some."""

import copy
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from harness.config import RunConfig, load_config
from harness.data.collation import collate
from harness.files import read_json
from harness.models.calling import arguments
from harness.run_directory import RunDirectory
from harness.statistics.store import StatisticsReader
from harness.tasks.registry import load_task
from tests.conftest import gang_command, run_gang
from tests.gangs import gang_environment
from tests.tasks.llava import configuration

pytestmark = pytest.mark.slow

STEPS = 6
ANCHOR = {"kl": 1.0, "prompts_per_step": 3}
LORA, KPM = {"name": "lora", "rank": 4}, {"name": "corda", "mode": "kpm", "rank": 4}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": LORA, "model": {"projector": "full"}, "anchor": ANCHOR},
    "checkpointing": {
        **{"method": LORA, "model": {"projector": "full"}, "anchor": ANCHOR},
        "train": {"gradient_checkpointing": True},
    },
    "kpm": {
        **{"method": KPM, "model": {"projector": "adapted"}, "anchor": ANCHOR},
        "data": {"replay": {"ratio": 0.25}},
        "init": {"collection": "streamed"},
    },
    "nf4": {"method": KPM, "model": {"quantization": "nf4"}, "anchor": ANCHOR},
    "bf16": {"method": KPM, "model": {"projector": "full", "dtype": "bfloat16"}, "anchor": ANCHOR},
    "full": {"method": {"name": "full"}, "model": {"projector": "full"}, "train": {"learning_rate": 1.0e-4}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run folders by (kind, ranks, ZeRO stage), made on demand once; ``start``: what runs a configuration."""
    folder = tmp_path_factory.mktemp("runs")
    world = tmp_path_factory.mktemp("llava") / "world"
    made: dict[tuple[str, int, int], Path] = {}

    def make(kind: str, ranks: int, zero: int, start: Callable[[Path, int], None] = run_gang, name: str = "") -> Path:
        key = (name or kind, ranks, zero)
        if key not in made:
            content = configuration(world, folder)
            for block, changes in copy.deepcopy(KINDS[kind]).items():
                content[block] = content.get(block, {}) | changes if block != "method" else changes
            content["name"] = f"{name or kind}-{ranks}-zero{zero}"
            content["train"] = {
                "deepspeed": f"ds_configs/zero{zero}.json",
                "max_steps": STEPS,
                "batch_size": 8,
                "micro_batch_size": 1,  # a pass has an image or has none
                "learning_rate": 1.0e-3,
                "save_steps": 2,
                "log_steps": 1,
                "preserve_loss_steps": 3,
                **KINDS[kind].get("train", {}),
            }
            path = folder / f"{content['name']}.yaml"
            path.write_text(yaml.safe_dump(content))
            start(path, ranks)
            made[key] = folder / content["name"]
        return made[key]

    return make


def trained(run: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted((run / "checkpoints" / f"step-{STEPS}" / "trained").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_equal_runs(left: Path, right: Path, bound: float = 1e-3) -> None:
    one, two = trained(left), trained(right)
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).norm() <= bound * one[name].norm(), name
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (left, right)]
    for name in ("loss", "preserve_loss", "anchor_kl"):
        first, second = ([line[name] for line in log if name in line] for log in logs)
        assert len(first) == len(second)
        torch.testing.assert_close(torch.tensor(second), torch.tensor(first), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "zero"), [("lora", 2), ("lora", 3), ("kpm", 2), ("kpm", 3), ("nf4", 2), ("nf4", 3), ("full", 3)]
)
def test_two_ranks_equal_one_process(runs: Callable[..., Path], kind: str, zero: int) -> None:
    assert_equal_runs(runs(kind, 1, 2), runs(kind, 2, zero))


@pytest.mark.parametrize("zero", [2, 3])
def test_gradient_checkpointing_changes_nothing(runs: Callable[..., Path], zero: int) -> None:
    assert_equal_runs(runs("lora", 1, 2), runs("checkpointing", 2, zero))


def test_statistics_are_the_same_on_two_ranks(runs: Callable[..., Path]) -> None:
    one, two = (StatisticsReader(runs("kpm", ranks, 2) / "statistics") for ranks in (1, 2))
    layers = list(read_json(runs("kpm", 1, 2) / "init" / "report.json")["layers"])
    assert "model.multi_modal_projector.linear_2" in layers
    for layer in layers:
        left, right = one.input_covariance(layer), two.input_covariance(layer)
        assert left.tokens == right.tokens
        assert (left.matrix - right.matrix).norm() <= 1e-5 * left.matrix.norm()


@torch.no_grad()
def outputs(model: Any, config: RunConfig) -> torch.Tensor:
    task = load_task(config)
    rows = task.rows(task.read(config.data.train, "data.train")[:6])
    batch = collate(rows, task.pad_id)
    assert "pixel_values" in batch
    return model(**arguments(model, batch)).logits[batch["attention_mask"].bool()].float()


@pytest.mark.parametrize(("kind", "zero"), [("lora", 3), ("kpm", 3), ("nf4", 3), ("full", 3)])
def test_merged_equals_the_adapter_and_the_tower_is_as_it_was(runs: Callable[..., Path], kind: str, zero: int) -> None:
    run = runs(kind, 2, zero)
    config = load_config(run / "config.yaml")
    merged = AutoModelForImageTextToText.from_pretrained(run / "merged", dtype=torch.float32).eval()
    base = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=torch.float32).eval()
    found, before = outputs(merged, config), outputs(base, config)
    assert (found - before).abs().max() > 1e-2  # training did something
    for name, weight in base.named_parameters():
        if ".vision_tower." in name or (".multi_modal_projector." in name and kind == "nf4"):
            assert torch.equal(weight, merged.get_parameter(name)), name
    projector = [
        n for n, p in base.named_parameters() if "projector" in n and not torch.equal(p, merged.get_parameter(n))
    ]
    assert bool(projector) == (kind != "nf4")
    if kind == "full":
        assert not (run / "adapter").exists()
        return
    under = RunDirectory(run).frozen_base if kind == "nf4" else config.model.path
    original = AutoModelForImageTextToText.from_pretrained(under, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(original, str(run / "adapter")).eval()
    assert (outputs(adapted, config) - found).abs().max() <= 1e-4 * found.abs().max()


def test_bf16_trains_and_leaves_the_tower_as_it_was(runs: Callable[..., Path]) -> None:
    run = runs("bf16", 2, 3)
    config = load_config(run / "config.yaml")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert all(loss == loss and loss < 20 for loss in losses)
    base, merged = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        for folder in (config.model.path, run / "merged")
    )
    same = {name for name, weight in base.named_parameters() if torch.equal(weight, merged.get_parameter(name))}
    assert {name for name, _ in base.named_parameters() if ".vision_tower." in name} <= same
    assert "model.multi_modal_projector.linear_1.weight" not in same


def test_a_run_that_was_killed_goes_on_to_the_same_end(runs: Callable[..., Path]) -> None:
    def killed(config: Path, ranks: int) -> None:
        process = subprocess.Popen(
            gang_command(config, ranks),
            env=gang_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        content = yaml.safe_load(config.read_text())
        first = Path(content["output_dir"]) / content["name"] / "checkpoints" / "step-2"
        while process.poll() is None and not first.exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert first.exists()
        assert not (first.parent / f"step-{STEPS}").exists()
        run_gang(config, ranks)

    assert_equal_runs(runs("lora", 2, 3), runs("lora", 2, 3, killed, "killed"), bound=0.0)
