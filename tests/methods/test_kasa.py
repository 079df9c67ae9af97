"""KaSA: what is removed, the update and the penalties against float64 and against PEFT's own KaSA; training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file

from harness.adapters.lora import SIGMA, lora_layers, original_model, read_layers
from harness.errors import UserError
from harness.files import read_json
from harness.methods.base import LowRank
from harness.methods.kasa import KaSA, KaSAOptions
from harness.methods.registry import build_method
from harness.models.targets import Layer
from harness.stages.export import export
from harness.stages.train import build_model
from tests.methods.formulas import SHAPES, milora, weight_of
from tests.methods.runs import base_model, largest, live_model, logits, perturb, step_zero, write_checkpoint
from tests.training.test_runs import alone, largest_difference, trained

METHOD: dict[str, Any] = {"name": "kasa", "rank": 5, "alpha": 10.0}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_0_and_update_against_float64(shape: tuple[int, int]) -> None:
    W, layer = weight_of(shape, "outliers"), Layer("model.layers.0.mlp.up_proj", *shape)
    method = KaSA(KaSAOptions(rank=5, alpha=10.0), 3)
    start = method.initialise(layer, W, 5, None, {})
    B, A = start.subtracted
    removed, expected = 2.0 * (B.double() @ A.double()), milora(W, 5)
    assert (removed - expected).norm() <= 1e-6 * W.double().norm()
    assert start.report["share_of_weight"] == pytest.approx(float(expected.norm() / W.double().norm()), rel=1e-6)
    assert not start.B.any()
    generator = torch.Generator().manual_seed(1)
    moved = {
        "lora_A.weight": start.A,
        "lora_B.weight": torch.randn(shape[0], 5, generator=generator),
        SIGMA: start.extra[SIGMA],
    }
    update = method.update(moved, LowRank(B, A, 2.0)).dense().double()
    added = sum(
        2.0 * moved[SIGMA][i].double() * torch.outer(moved["lora_B.weight"][:, i].double(), start.A[i].double())
        for i in range(5)
    )
    assert (update - (added - expected)).norm() <= 1e-5 * added.norm()


def test_computes_and_is_penalised_like_pefts(base_config: dict[str, Any]) -> None:
    """PEFT truncates by an fp32 SVD; with our tensors put into its model both compute and lose the same."""
    config, run = step_zero(base_config, METHOD | {"beta": 0.02, "gamma": 0.03}, "peft")
    method = build_method(config.method, 0)
    ours = build_model(config, run, method, None, needs_original=False).eval()
    perturb(ours, 0.2)
    reference = LoraConfig(
        r=5,
        lora_alpha=10,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        kasa_config=KasaConfig(beta=0.02, gamma=0.03),
    )
    theirs = get_peft_model(base_model(config), reference).eval()
    sources = lora_layers(ours)
    with torch.no_grad():
        for name, layer in lora_layers(theirs).items():
            layer.lora_A["default"].weight.copy_(sources[name].lora_A["default"].weight)
            layer.lora_B["default"].weight.copy_(sources[name].lora_B["default"].weight)
            layer.lora_diag["default"].copy_(sources[name].lora_sigma["default"].weight)
    expected = logits(theirs)
    assert largest(logits(ours), expected) <= 1e-4 * float(expected.abs().max())
    found, penalty = method.penalty(ours), theirs.base_model._get_kasa_loss()
    assert found.item() == pytest.approx(penalty.item(), rel=1e-6)
    found.backward()
    penalty.backward()
    for name, layer in lora_layers(theirs).items():
        for own, other in (
            (sources[name].lora_A["default"].weight, layer.lora_A["default"].weight),
            (sources[name].lora_B["default"].weight, layer.lora_B["default"].weight),
            (sources[name].lora_sigma["default"].weight, layer.lora_diag["default"]),
        ):
            assert torch.allclose(own.grad, other.grad, atol=1e-6)
    assert KaSA(KaSAOptions(beta=0.0, gamma=0.0)).penalty(ours) is None


def test_the_original_model_is_the_untruncated_one(base_config: dict[str, Any]) -> None:
    config, run = step_zero(base_config, METHOD, "original")
    base, model = logits(base_model(config)), live_model(config, run)
    distance = largest(logits(model), base)
    assert distance > 1e-3  # components are gone
    with original_model(model):
        assert largest(logits(model), base) <= 1e-4 * float(base.abs().max())
    assert largest(logits(model), base) == distance
    write_checkpoint(model, run)
    export(config, run)
    removed = milora(base_model(config).model.layers[0].mlp.up_proj.weight.detach(), 5)
    merged = load_file(run.merged / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].double()
    W = base_model(config).model.layers[0].mlp.up_proj.weight.detach().double()
    assert (merged - (W - removed)).norm() <= 1e-6 * W.norm()


def test_over_a_quantised_base(base_config: dict[str, Any]) -> None:
    """What is quantised is the truncated weight; the error of step 0 counts what was removed."""
    pytest.importorskip("bitsandbytes")
    base_config["model"]["quantization"] = "nf4"
    config, run = step_zero(base_config, METHOD, "nf4")
    model = live_model(config, run, needs_original=False)
    with torch.no_grad():
        assert logits(model).isfinite().all()
    layer = read_json(run.init / "report.json")["layers"]["model.layers.0.mlp.up_proj"]
    assert layer["weight_error"] >= layer["share_of_weight"]


def test_rank_leaves_something(base_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^method\.rank: 64 given; layer model\.layers\.0\.self_attn\.q_proj is 64×64"):
        step_zero(base_config, METHOD | {"rank": 64}, "whole")


@pytest.mark.slow
def test_zero_3_trains_as_zero_2(base_config: dict[str, Any], tmp_path: Path) -> None:
    base_config |= {"method": METHOD | {"beta": 0.1, "gamma": 0.1}, "anchor": {"kl": 1.0, "prompts_per_step": 2}}
    train = base_config.pop("train") | {"max_steps": 4, "save_steps": 4, "log_steps": 1}
    runs = {
        zero: alone(base_config, tmp_path, f"zero{zero}", train={**train, "deepspeed": f"ds_configs/zero{zero}.json"})
        for zero in (2, 3)
    }
    assert largest_difference(trained(runs[2], 4), trained(runs[3], 4)) <= 1e-3
    start = {f"{layer}.{n}": t for layer, own in read_layers(runs[2] / "init").items() for n, t in own.items()}
    assert start.keys() == trained(runs[3], 4).keys()
    assert all(not torch.equal(start[name], value) for name, value in trained(runs[3], 4).items())
