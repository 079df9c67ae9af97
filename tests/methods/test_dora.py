"""DoRA: the update against float64, magnitudes at step 0, and training under ZeRO-2 and ZeRO-3."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.adapters.lora import lora_layers, read_layers
from harness.config import ModelConfig
from harness.errors import UserError
from harness.methods.base import LowRank
from harness.methods.dora import DoRA
from harness.methods.lora import LoRAOptions
from harness.models.quantisation import nf4_values
from harness.models.targets import Layer, target_modules
from tests.methods.runs import base_model, largest, live_model, logits, step_zero
from tests.training.test_runs import alone, largest_difference, trained

METHOD = {"name": "dora", "rank": 4, "alpha": 6.0}


def weight(out: int, into: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out)
    values = torch.randn(out, into, generator=generator)
    values[:, :3] *= 60  # outlier channels
    return values


@pytest.mark.parametrize(("out", "into"), [(40, 24), (24, 40)])
def test_update_against_float64(out: int, into: int) -> None:
    generator = torch.Generator().manual_seed(1)
    W, A, B = weight(out, into), torch.randn(4, into, generator=generator), torch.randn(out, 4, generator=generator)
    m = W.norm(dim=1) * (1 + 0.2 * torch.rand(out, generator=generator))
    tensors = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
    update = DoRA(LoRAOptions(rank=4, alpha=6.0)).update(tensors, None)
    assert not isinstance(update, LowRank)
    expected = torch.empty(out, into, dtype=torch.float64)
    for i in range(out):
        row = W[i].double() + 1.5 * (B[i].double() @ A.double())
        expected[i] = m[i].double() * row / (row @ row).sqrt() - W[i].double()
    found = update.dense(W).double()
    assert (found - expected).norm() <= 1e-6 * (expected + W.double()).norm()
    # Its rows have the trained magnitudes as norms, whatever A and B are.
    assert torch.allclose((W + found.float()).norm(dim=1), m, rtol=1e-5)


def test_step_0_changes_nothing() -> None:
    layer, W = Layer("layer", 40, 24), weight(40, 24)
    method = DoRA(LoRAOptions(rank=4), 0)
    start = method.initialise(layer, W, 4, None, {})
    assert torch.allclose(start.extra["lora_magnitude_vector"].double(), W.double().square().sum(1).sqrt(), rtol=1e-6)
    assert float(method.update(start.tensors(method.pair), None).dense(W).abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_magnitudes_come_from_init(base_config: dict[str, Any], dtype: str) -> None:
    base_config["model"]["dtype"] = dtype
    config, run = step_zero(base_config, METHOD, "start")
    model = live_model(config, run)
    layers = read_layers(run.init)
    weights = target_modules(base_model(config), "all-linear")
    for name, layer in lora_layers(model).items():
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.requires_grad
        assert torch.equal(magnitude, layers[name]["lora_magnitude_vector"].to(magnitude.dtype))
        assert torch.allclose(magnitude, weights[name].weight.float().norm(dim=1), rtol=1e-6)
    base = logits(base_model(config))
    assert largest(logits(model), base) <= (1e-4 if dtype == "float32" else 2e-2) * float(base.abs().max())


def test_over_a_quantised_base_magnitudes_are_of_the_quantised_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, W = Layer("layer", 64, 128), weight(64, 128)
    quantised = ModelConfig(path="x", dtype="float32", quantization="nf4")
    start = DoRA(LoRAOptions(rank=4), 0, quantised).initialise(layer, W, 4, None, {})
    magnitude = start.extra["lora_magnitude_vector"]
    assert torch.allclose(magnitude, nf4_values(W, True).norm(dim=1), rtol=1e-6)
    assert not torch.allclose(magnitude, W.norm(dim=1), rtol=1e-4)

    model = torch.nn.Linear(2, 2)
    model.is_loaded_in_4bit = True
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match=r"^train\.deepspeed: ZeRO-3 given; .* works under ZeRO 1 and 2"):
        DoRA(LoRAOptions(rank=4)).attach(model, {})


@pytest.mark.slow
def test_zero_3_trains_as_zero_2(base_config: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's layer reads the base weight itself, which ZeRO-3 must gather for it. The anchor is zero at step 0."""
    base_config["method"] = METHOD
    base_config["anchor"] = {"kl": 1.0, "prompts_per_step": 5}
    train = base_config.pop("train") | {"max_steps": 4, "save_steps": 4, "log_steps": 1, "gradient_checkpointing": True}
    runs = {
        zero: alone(base_config, tmp_path, f"zero{zero}", train={**train, "deepspeed": f"ds_configs/zero{zero}.json"})
        for zero in (2, 3)
    }
    assert largest_difference(trained(runs[2], 4), trained(runs[3], 4)) <= 1e-3
    start = {f"{layer}.{name}": t for layer, own in read_layers(runs[2] / "init").items() for name, t in own.items()}
    moved = trained(runs[3], 4)
    magnitudes = [name for name in start if name.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == 14
    assert all(float((moved[name] - start[name]).norm() / start[name].norm()) > 1e-5 for name in magnitudes)
