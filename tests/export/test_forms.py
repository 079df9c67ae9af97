"""Forms whose trained tensors are not a pair (A, B): the live model, `adapter/` and `merged/` compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from harness.adapters.lora import read_adapter
from harness.config import RunConfig
from harness.errors import UserError
from harness.evaluation.candidates import servable
from harness.evaluation.stage import tuned_candidates
from harness.export.merge import base_tensors, write_merged
from harness.files import read_json
from harness.methods.registry import build_method
from harness.run_directory import RunDirectory
from harness.stages.export import export
from harness.stages.train import build_model
from harness.training.checkpoint import trained_parameters
from tests.export.test_agreement import BOUND, by_peft_alone, by_transformers_alone
from tests.methods.biased import biased_base, biased_config  # noqa: F401 - fixtures
from tests.methods.runs import base_model, largest, logits, perturb, step_zero, write_checkpoint

FORMS: dict[str, dict[str, Any]] = {
    "dora": {"name": "dora", "rank": 4},
    "dora, alpha 9": {"name": "dora", "rank": 4, "alpha": 9.0},
    "adalora": {"name": "adalora", "init_r": 6, "target_r": 3},
    "adalora, alpha 20": {"name": "adalora", "init_r": 6, "target_r": 3, "alpha": 20.0},
    "bitfit": {"name": "bitfit"},
}


def live(config: RunConfig, run: RunDirectory) -> nn.Module:
    return build_model(config, run, build_method(config.method, 0), None, needs_original=True).eval()


@torch.no_grad()
def mask_some(model: nn.Module) -> None:
    """Zero entries of Λ as an allocation leaves them: another number in every layer, all of them in the first."""
    entries = [p for name, p in trained_parameters(model) if name.endswith("lora_E")]
    for number, parameter in enumerate(entries):
        parameter[number % 6 :] = 0


def moved(config: RunConfig, run: RunDirectory, step: int = 1, size: float = 0.2) -> torch.Tensor:
    """Move what is trained and leave it as a checkpoint; the live model's logits."""
    model = live(config, run)
    perturb(model, size)
    mask_some(model)
    write_checkpoint(model, run, step)
    return logits(model)


@pytest.fixture(params=FORMS, ids=str)
def started(request: pytest.FixtureRequest, biased_config: dict[str, Any]) -> tuple[RunConfig, RunDirectory]:  # noqa: F811
    return step_zero(biased_config, FORMS[request.param], "run")


def test_step_0(started: tuple[RunConfig, RunDirectory]) -> None:
    base = logits(base_model(started[0]))
    assert largest(logits(live(*started)), base) <= 1e-5 * float(base.abs().max())


def test_agree(started: tuple[RunConfig, RunDirectory]) -> None:
    config, run = started
    found = moved(config, run)
    export(config, run)
    scale = float(found.abs().max())
    assert largest(found, logits(base_model(config))) > 0.1
    assert largest(by_transformers_alone(run.merged), found) <= BOUND * scale
    if config.method["name"] == "bitfit":
        assert not run.adapter.exists()
        return
    assert largest(by_peft_alone(config, run.adapter), found) <= BOUND * scale
    content = read_json(run.adapter / "adapter_config.json")
    assert content["peft_type"] == "LORA"
    assert content["use_dora"] == (config.method["name"] == "dora")
    # vLLM serves a plain LoRA, and is given the merged model of any other form.
    served = servable(tuned_candidates(config.model.path, run, checkpoints=False)[0], "vllm")
    assert (served.adapter is None) == (config.method["name"] == "dora")
    if config.method["name"] == "adalora":
        ranks = {name: factor.A.shape[0] for name, factor in read_adapter(run.adapter).items()}
        assert set(ranks.values()) == {1, 2, 3, 4, 5}  # layers without a rank have no tensors
        assert len(ranks) < 14


def test_dora_adapter_has_the_names_that_peft_saves(biased_config: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    config, run = step_zero(biased_config, FORMS["dora"], "run")
    moved(config, run)
    export(config, run)
    model = PeftModel.from_pretrained(base_model(config), str(run.adapter))
    model.save_pretrained(str(tmp_path))
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run.adapter, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("form", "backend", "merged"), [("dora", "vllm", True), ("dora", "hf", False)])
def test_checkpoints_are_merged_where_an_engine_needs_it(
    biased_config: dict[str, Any],  # noqa: F811
    form: str,
    backend: str,
    merged: bool,
) -> None:
    biased_config["eval"] = {"checkpoints": True, "backend": backend}
    config, run = step_zero(biased_config, FORMS[form], "run")
    earlier = moved(config, run, 1, 0.1)
    moved(config, run, 2)
    export(config, run)
    folder = run.checkpoints / "step-1"
    assert largest(by_peft_alone(config, folder / "adapter"), earlier) <= BOUND * float(earlier.abs().max())
    assert (folder / "merged").is_dir() == merged
    if merged:
        assert largest(by_transformers_alone(folder / "merged"), earlier) <= BOUND * float(earlier.abs().max())


def test_bitfit_replaces_biases_and_nothing_else(biased_config: dict[str, Any]) -> None:  # noqa: F811
    biased_config["model"]["dtype"] = "bfloat16"
    config, run = step_zero(biased_config, FORMS["bitfit"], "run")
    moved(config, run)
    export(config, run)
    trained = load_file(run.checkpoints / "step-1" / "trained" / "model.safetensors")
    merged = load_file(run.merged / "model.safetensors")
    assert len(trained) == 6
    for name, tensor in base_tensors(config.model.path):
        assert torch.equal(merged[name], trained.get(name, tensor).to(torch.bfloat16)), name
    with pytest.raises(UserError, match=r"stores no tensor called nothing\.bias; .*does not cover$"):
        write_merged(run.path / "x", config.model.path, torch.float32, {}, {"nothing.bias": torch.zeros(2)})


@pytest.mark.parametrize("form", ["dora", "adalora"])
def test_quantised(biased_config: dict[str, Any], form: str) -> None:  # noqa: F811
    """Over an NF4 base step 0 is the frozen base, and the adapter lies on that."""
    biased_config["model"]["quantization"] = "nf4"
    config, run = step_zero(biased_config, FORMS[form], "run")
    start = logits(live(config, run))
    found = moved(config, run)
    export(config, run)
    frozen = by_transformers_alone(run.frozen_base)
    assert largest(start, frozen) <= BOUND * float(frozen.abs().max())
    assert largest(by_transformers_alone(run.merged), found) <= BOUND * float(found.abs().max())
    on_frozen = config.model_copy(update={"model": config.model.model_copy(update={"path": str(run.frozen_base)})})
    assert largest(by_peft_alone(on_frozen, run.adapter), found) <= BOUND * float(found.abs().max())
    # What report.json says of layers is true of the adapter at step 0, which adds nothing.
    weights, quantised = dict(base_tensors(config.model.path)), dict(base_tensors(str(run.frozen_base)))
    for name, layer in read_json(run.init / "report.json")["layers"].items():
        W, Q = weights[f"{name}.weight"].double(), quantised[f"{name}.weight"].double()
        assert layer["weight_error"] == pytest.approx(float((W - Q).norm() / W.norm()), rel=1e-5)
