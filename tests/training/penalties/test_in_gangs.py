"""LALoRA and MIGU in real training: ranks, ZeRO stages, accumulation and resuming change nothing; λ = 0 is LoRA."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import run_gang
from tests.training.test_runs import equal, kill_after, largest_difference, trained

pytestmark = pytest.mark.slow
THRESHOLD = 0.6
# All curvatures at once, one of them on a source of its own, and masked gradients: one gang says something about each.
PENALTIES = [
    {"name": "lalora", "lambda": 1.0e-3},
    {"name": "lalora", "lambda": 1.0e-3, "curvature": "kfac"},
    {"name": "lalora", "lambda": 1.0e-3, "curvature": "kfac_tri", "sources": "train and preserve"},
    {"name": "migu", "threshold": THRESHOLD},
]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def content(random_base: Path, data_files: dict[str, Path]) -> dict[str, Any]:
    preserve = {"path": str(data_files["preserve"]), "prompt": "q", "samples": 20}
    train = {"path": str(data_files["train"]), "prompt": "q", "response": "a", "samples": 9}
    penalties = copy.deepcopy(PENALTIES)
    penalties[2]["sources"] = [train, preserve]
    return {
        "model": {"path": str(random_base), "dtype": "float32"},
        "data": {"train": train, "preserve": preserve, "max_length": 64},
        # Its start is a function of W alone. Where a start depends on statistics, rounding differs between numbers of
        # ranks, and the smallest gradients by much more.
        "method": {"name": "pissa", "rank": 8},
        "anchor": {"kl": 1.0, "prompts_per_step": 3},
        "penalties": penalties,
        "train": {
            "max_steps": 4,
            "batch_size": 12,
            "micro_batch_size": 3,  # four passes on one rank, two on two
            "learning_rate": 1.0e-3,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "save_steps": 1,
            "log_steps": 1,
        },
    }


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> Make:
    """The run directory of a gang, made once; blocks given by keyword replace those of ``content``."""
    folder = tmp_path_factory.mktemp("gangs")
    made: dict[str, Path] = {}

    def run(name: str, ranks: int, zero: int, **blocks: Any) -> Path:
        if name not in made:
            path = write(folder, content, name, zero, **blocks)
            run_gang(path, ranks)
            made[name] = folder / name
        return made[name]

    return run


def write(folder: Path, content: dict[str, Any], name: str, zero: int, **blocks: Any) -> Path:
    path = folder / f"{name}.yaml"
    whole = {**copy.deepcopy(content), "name": name, "output_dir": str(folder), **blocks}
    whole["train"] = {**whole["train"], "deepspeed": f"ds_configs/zero{zero}.json"}
    path.write_text(yaml.safe_dump(whole))
    return path


def laplace(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["laplace"] for line in lines if "laplace" in line]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_ranks_equal_one(make: Make, zero: int) -> None:
    one, two = make("one", 1, 2), make(f"two-zero{zero}", 2, zero)
    files = sorted(file.name for file in (one / "prepared").glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        left, right = load_file(one / "prepared" / file), load_file(two / "prepared" / file)
        assert left.keys() == right.keys()
        for key in left:
            assert (left[key].double() - right[key].double()).norm() <= 1e-5 * left[key].double().norm(), key
    assert largest_difference(trained(one, 4), trained(two, 4)) <= 1e-3
    values = laplace(one)
    assert values[0] == pytest.approx(0.0, abs=1e-6) and min(values[1:]) > 0.0
    assert laplace(two) == pytest.approx(values, rel=1e-3, abs=1e-6)


def unchanged(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many rows of each weight are what they were."""
    return {name: int((before[name] == after[name]).all(1).sum()) for name in after}


def masked(after: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(THRESHOLD * len(value)) for name, value in after.items()}


def step_zero(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "init" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): value for name, value in tensors.items()}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_first_step_leaves_masked_rows_as_they_are(make: Make, zero: int) -> None:
    """Adam moves a row whose gradients were all zero by nothing."""
    run = make(f"two-zero{zero}", 2, zero)
    after = trained(run, 1)
    assert len(after) == 28
    assert unchanged(step_zero(run), after) == masked(after)


@pytest.mark.parametrize("zero", [1, 3])
def test_bfloat16(make: Make, content: dict[str, Any], zero: int) -> None:
    """DeepSpeed keeps gradients elsewhere; and θ − μ is exactly zero at step 0 although μ is not a bf16 number."""
    model = {**content["model"], "dtype": "bfloat16"}
    run = make(f"bfloat16-zero{zero}", 2, zero, model=model, train={**content["train"], "max_steps": 2})
    after = trained(run, 1)
    start = step_zero(run)
    if zero == 1:  # masters are made of the parameters as bf16 has them; under ZeRO-3 of what those were before
        start = {name: value.bfloat16().float() for name, value in start.items()}
    assert unchanged(start, after) == masked(after)
    values = laplace(run)
    assert values[0] == 0.0 and values[1] > 0.0


def test_lambda_0_is_lora_bit_for_bit(make: Make, content: dict[str, Any]) -> None:
    """And threshold 0: penalties of no weight leave no trace, whatever else they are given."""
    nothing = [{"name": "lalora", "lambda": 0.0, "curvature": "kfac"}, {"name": "migu", "threshold": 0.0}]
    lora = {"method": {"name": "lora", "rank": 8}, "anchor": None}
    plain, zero, some = (
        make(name, 1, 2, **lora, penalties=penalties)
        for name, penalties in (
            ("plain", []),
            ("zero", nothing),
            ("some", [{"name": "lalora", "lambda": 1.0e4}]),
        )
    )
    assert equal(trained(plain, 4), trained(zero, 4))
    assert not (zero / "prepared").exists() and not laplace(zero)
    # Equality says something: with a large λ it is another run. B is held where it started, at zero.
    size = {run: sum(float(v.norm()) for n, v in trained(run, 4).items() if "lora_B" in n) for run in (plain, some)}
    assert size[some] < 0.9 * size[plain]


def test_killed_and_resumed(make: Make, content: dict[str, Any], tmp_path: Path) -> None:
    """μ is the adapter at step 0 and not the one that training went on from."""
    path = write(tmp_path, content, "killed", 3)
    kill_after(path, 2, tmp_path / "killed" / "checkpoints" / "step-2")
    run = tmp_path / "killed"
    for later in (3, 4):
        for leftover in (run / "checkpoints").glob(f"*step-{later}*"):
            shutil.rmtree(leftover)
    run_gang(path, 2)
    undisturbed = make("two-zero3", 2, 3)
    assert equal(trained(undisturbed, 2), trained(run, 2))
    assert equal(trained(undisturbed, 4), trained(run, 4))
