"""BitFit: which parameters are trained, the original model beside them, and training under ZeRO-2 and ZeRO-3."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.adapters.base_parameters import initial_parameters
from harness.adapters.lora import original_model
from harness.config import RunConfig, resolve
from harness.errors import UserError
from harness.methods.bitfit import BitFit, BitFitOptions
from harness.methods.registry import build_method
from harness.preflight import check
from harness.run_directory import RunDirectory
from harness.stages.train import build_model
from harness.training.checkpoint import trained_parameters
from tests.methods.biased import biased_base, biased_config  # noqa: F401 - fixtures
from tests.methods.runs import base_model, largest, logits, perturb, step_zero, write_checkpoint
from tests.training.test_runs import alone, largest_difference, trained

ATTENTION = [f"model.layers.{i}.self_attn.{kind}_proj.bias" for i in (0, 1) for kind in "qkv"]


def live(config: RunConfig, run: RunDirectory, needs_original: bool, resume: Path | None = None) -> nn.Module:
    return build_model(config, run, build_method(config.method, 0), resume, needs_original).eval()


@pytest.mark.parametrize(
    ("targets", "biases", "expected"),
    [
        ("all-linear", "target", ATTENTION),
        (["q_proj", "o_proj"], "target", [name for name in ATTENTION if "q_proj" in name]),
        (["o_proj"], "all", ATTENTION),
    ],
)
def test_what_is_trained(
    biased_config: dict[str, Any],  # noqa: F811
    targets: str | list[str],
    biases: str,
    expected: list[str],
) -> None:
    biased_config["model"]["target_modules"] = targets
    config, run = step_zero(biased_config, {"name": "bitfit", "biases": biases}, "run")
    model = live(config, run, needs_original=False)
    assert sorted(name for name, _ in trained_parameters(model)) == sorted(expected)
    assert largest(logits(model), logits(base_model(config))) == 0.0


def test_normalisation_biases_are_not_those_of_target_layers() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    with pytest.raises(UserError, match=r"target layers have no biases to train; set method.biases to all, or use an"):
        BitFit(BitFitOptions()).attach(model, {"1": 0})
    BitFit(BitFitOptions(biases="all")).attach(model, {"1": 0})
    assert [name for name, _ in trained_parameters(model)] == ["0.bias"]


def test_a_base_without_biases(base_config: dict[str, Any]) -> None:
    config, run = step_zero(base_config, {"name": "bitfit"}, "run")
    with pytest.raises(UserError, match=r"^method\.name: bitfit given, but the model has no biases to train; use an"):
        live(config, run, needs_original=False)


def test_the_original_model_is_reached_through_the_trained_one(
    biased_config: dict[str, Any],  # noqa: F811
) -> None:
    config, run = step_zero(biased_config, {"name": "bitfit"}, "run")
    check(resolve({**biased_config, "method": {"name": "bitfit"}, "anchor": {"kl": 1.0}}))  # the anchor is allowed
    model, base = live(config, run, needs_original=True), logits(base_model(config))
    assert len(list(trained_parameters(model))) == len(ATTENTION)
    perturb(model, 0.2)
    moved = logits(model)
    assert largest(moved, base) > 0.1
    with original_model(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), moved)
    with pytest.raises(KeyError), original_model(model):
        raise KeyError
    assert torch.equal(logits(model), moved)
    without = live(config, run, needs_original=False)
    with pytest.raises(ValueError, match="no parameter was kept"), initial_parameters(without):
        pass


def test_resuming_reads_the_trained_biases_and_keeps_the_original_ones(
    biased_config: dict[str, Any],  # noqa: F811
) -> None:
    config, run = step_zero(biased_config, {"name": "bitfit"}, "run")
    model = live(config, run, needs_original=True)
    perturb(model, 0.2)
    again = live(config, run, needs_original=True, resume=write_checkpoint(model, run).parent)
    assert torch.equal(logits(again), logits(model))
    with original_model(again):
        assert torch.equal(logits(again), logits(base_model(config)))


@pytest.mark.slow
def test_zero_3_trains_as_zero_2(
    biased_config: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    biased_config["method"] = {"name": "bitfit"}
    biased_config["anchor"] = {"kl": 1.0, "prompts_per_step": 5}
    train = biased_config.pop("train") | {"max_steps": 4, "save_steps": 4, "log_steps": 1}
    runs = {
        zero: alone(biased_config, tmp_path, f"zero{zero}", train={**train, "deepspeed": f"ds_configs/zero{zero}.json"})
        for zero in (2, 3)
    }
    assert largest_difference(trained(runs[2], 4), trained(runs[3], 4)) <= 1e-3
    for run in runs.values():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert abs(lines[0]["anchor_kl"]) <= 1e-6
        assert lines[-1]["anchor_kl"] > 10 * abs(lines[0]["anchor_kl"])
