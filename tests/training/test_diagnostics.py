"""Norms, amplification factors and orthogonality errors against dense float64 computations, alone and in a run."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import TrainerControl, TrainerState

from harness.adapters.lora import INITIAL, read_adapter, saved_name
from harness.decomposition.factors import leading_svd
from harness.methods.base import LowRank
from harness.methods.registry import build_method
from harness.models.targets import Layer
from harness.stages.initialise import subtracted_blocks
from harness.training.diagnostics import QUANTITIES, Diagnostics, HeldLayer, measure_layer, summarise
from tests.conftest import run_gang
from tests.methods.runs import RANK, base_model, live_model, perturb, step_zero

PARTS = ("norms", "amplification", "orthogonality")


def dense_reference(delta: torch.Tensor, W: torch.Tensor, rank: int) -> dict[str, float]:
    """The definitions, from whole matrices (float64): FCLoRA Appendix L."""
    U_d, sigma, Vh_d = torch.linalg.svd(delta)
    U_w, _, Vh_w = torch.linalg.svd(W)
    top = slice(0, min(rank, int((sigma > 1e-13 * sigma[0]).sum())))
    frobenius = float(delta.square().sum().sqrt())
    return {
        "spectral_norm": float(sigma[0]),
        "frobenius_norm": frobenius,
        "amplification_w_to_dw": frobenius / float((U_d[:, top].T @ W @ Vh_d[top].T).norm()),
        "amplification_dw_to_w": frobenius / float((U_w[:, :rank].T @ delta @ Vh_w[:rank].T).norm()),
    }


class Recorder:
    """A trainer as far as the callback looks at it: its model, and what is logged."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.logged: list[dict[str, float]] = []

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def by_type(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means and the largest spectral norm over the layers of each type, the plain way."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for layer, own in values.items():
        for quantity, value in own.items():
            for kind in (layer.split(".", 3)[3], "all"):
                grouped[f"{quantity}/{kind}"].append(value)
    means = {key: sum(own) / len(own) for key, own in grouped.items()}
    largest = {
        key.replace("spectral_norm/", "spectral_norm_max/"): max(own)
        for key, own in grouped.items()
        if key.startswith("spectral_norm/")
    }
    return means | largest


CASES: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": RANK, "alpha": 20.0},
    "kpm": {"name": "corda", "mode": "kpm", "rank": RANK, "alpha": 3.0},
    "lora_fa": {"name": "lora_fa", "rank": RANK},
    "adalora": {"name": "adalora", "init_r": RANK, "target_r": 4},
    "dora": {"name": "dora", "rank": RANK},
    "fclora": {"name": "fclora", "rank": RANK},
    "sorsa": {"name": "sorsa", "rank": RANK},
    "kasa": {"name": "kasa", "rank": RANK},
    "loftq, nf4": {"name": "loftq", "rank": RANK, "iterations": 2},
    "kpm, nf4": {"name": "corda", "mode": "kpm", "rank": RANK},
}
HAVE_VECTORS = ("adalora", "fclora", "sorsa", "kasa")


@pytest.mark.parametrize("case", CASES)
def test_callback(base_config: dict[str, Any], case: str) -> None:
    """A model whose adapter has moved, against the base loaded again and the update as a whole matrix."""
    if "nf4" in case:
        base_config["model"]["quantization"] = "nf4"
    config, run = step_zero(base_config, CASES[case], "run")
    model = live_model(config, run)  # with the frozen copy `initial` beside, where there is one
    recorder, method = Recorder(model), build_method(config.method, 0)
    subtracted = subtracted_blocks(run.init)
    callback = Diagnostics(recorder, method, run.init, subtracted, 2, PARTS)
    callback.on_train_begin(None, TrainerState(global_step=0), TrainerControl())
    (first,) = recorder.logged
    # KaSA drops W's smallest components, LoftQ's pair is not what it took out, DoRA's norm is computed anew.
    if case not in ("kasa", "loftq, nf4", "dora"):
        assert first["spectral_norm/all"] == first["frobenius_norm/all"] == 0.0
        assert not any(key.startswith("amplification") for key in first)

    perturb(model)
    control = TrainerControl(should_log=True)
    callback.on_step_end(None, TrainerState(global_step=1, max_steps=9), control)
    assert len(recorder.logged) == 1  # not due
    callback.on_step_end(None, TrainerState(global_step=2, max_steps=9), control)
    assert control.should_log
    _, second = recorder.logged

    base = base_model(config)
    expected = {}
    tensors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and INITIAL not in name:
            layer, _, rest = saved_name(name).rpartition(".lora_")
            tensors[layer][f"lora_{rest}"] = parameter.detach()
    for layer in read_adapter_names(run.init):
        W = base.get_submodule(layer).weight.detach()
        block = subtracted.get(layer)
        if "nf4" in case:
            from bitsandbytes.functional import dequantize_4bit

            weight = model.base_model.model.get_submodule(layer).get_base_layer().weight
            W = dequantize_4bit(weight.data, weight.quant_state).double()
            W = W + block.scaling * block.B.double() @ block.A.double() if block is not None else W
        update = method.update(tensors[layer], block)
        if isinstance(update, LowRank):
            delta = update.scaling * update.B.double() @ update.A.double()
        else:
            delta = update.dense(W).double()
        expected[layer] = dense_reference(delta, W.double(), RANK)
        if case in HAVE_VECTORS:
            own = {name.removesuffix(".weight"): tensor.double() for name, tensor in tensors[layer].items()}
            grams = (own["lora_B"].T @ own["lora_B"], own["lora_A"] @ own["lora_A"].T)
            identity = torch.eye(RANK, dtype=torch.float64)
            expected[layer]["orthogonality_error"] = sum(float((gram - identity).norm()) for gram in grams)
    expected = by_type(expected)
    assert second.keys() == expected.keys()
    assert len(second) == (6 if case in HAVE_VECTORS else 5) * 8  # quantities × (seven module types and all)
    for key, value in expected.items():
        # The base weight of a residual method went through fp32 once more.
        assert second[key] == pytest.approx(value, rel=1e-4), key
    assert second["spectral_norm_max/all"] > second["spectral_norm/all"] > 0


def read_adapter_names(init: Path) -> list[str]:
    return list(json.loads((init / "report.json").read_text())["layers"])


def test_residual_update_keeps_the_rank_of_the_adapter() -> None:
    """ΔW has rank 2r, the amplification factors look at its first r directions and at W's."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    B0, A0, W = draw(30, 3), draw(3, 20), draw(30, 20)
    W[4] *= 40
    method = build_method({"name": "pissa", "rank": 3, "alpha": 6.0}, 0)
    tensors = {"lora_A.weight": A0 + 0.3 * draw(3, 20), "lora_B.weight": B0 + 0.3 * draw(30, 3)}
    block = LowRank(B0, A0, 2.0)
    held = HeldLayer(tensors, W.double() - 2.0 * B0.double() @ A0.double(), block)
    delta = 2.0 * (tensors["lora_B.weight"].double() @ tensors["lora_A.weight"].double() - B0.double() @ A0.double())
    assert torch.linalg.matrix_rank(delta) == 6
    found = measure_layer(method, held, 3, leading_svd(W, 3), PARTS)
    assert found == pytest.approx(dense_reference(delta, W.double(), 3), rel=1e-6)
    assert found != pytest.approx(dense_reference(delta, W.double(), 6), rel=1e-3)
    assert found.keys() == set(QUANTITIES) - {"orthogonality_error"}  # PiSSA's form has no singular vectors
    # Parts that are not asked for cost nothing: neither weight nor its vectors are looked at.
    assert measure_layer(method, HeldLayer(tensors, None, block), 3, None, ["norms"]).keys() == {
        "spectral_norm",
        "frobenius_norm",
    }


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    """ΔW and W as (out, in · kernel)."""
    generator = torch.Generator().manual_seed(0)
    method = build_method({"name": "lora_conv", "rank": 3}, 0)
    shapes = method.form.shapes(Layer("conv", 12, 5, (3, 3)))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    W = torch.randn(12, 5, 3, 3, generator=generator)
    delta = method.update(tensors, None).dense(W).double().reshape(12, 45)
    matrix = W.double().reshape(12, 45)
    found = measure_layer(method, HeldLayer(tensors, W, None), 3, leading_svd(matrix, 3), PARTS)
    assert found == pytest.approx(dense_reference(delta, matrix, 3), rel=1e-5)


def test_means_are_over_layers_that_have_the_quantity() -> None:
    layers = ["model.layers.0.q", "model.layers.1.q", "model.layers.0.up"]
    found = [{"spectral_norm": 1.0, "amplification_w_to_dw": 4.0}, {"spectral_norm": 3.0}, {"spectral_norm": 5.0}]
    assert summarise(layers, found) == {
        "spectral_norm/q": 2.0,
        "spectral_norm_max/q": 3.0,
        "spectral_norm/up": 5.0,
        "spectral_norm_max/up": 5.0,
        "spectral_norm/all": 3.0,
        "spectral_norm_max/all": 5.0,
        "amplification_w_to_dw/q": 4.0,
        "amplification_w_to_dw/all": 4.0,
    }


@pytest.mark.slow
def test_two_ranks_under_zero3_equal_one(base_config: dict[str, Any], tmp_path: Path) -> None:
    """A residual method in a real run: same numbers, which are those of the exported adapter; and of every step."""
    base_config["method"] = {"name": "pissa", "rank": 8}
    base_config["train"] |= {"max_steps": 5, "save_steps": 5, "log_steps": 1, "micro_batch_size": 6}
    base_config["train"] |= {"diagnostics_steps": 2, "preserve_loss_steps": 2}
    lines = {}
    for ranks, zero in ((1, 2), (2, 3)):
        content = {**base_config, "output_dir": str(tmp_path / f"{ranks}")}
        content["train"] = {**content["train"], "deepspeed": f"ds_configs/zero{zero}.json"}
        path = tmp_path / f"{ranks}.yaml"
        path.write_text(yaml.safe_dump(content))
        run_gang(path, ranks)
        text = (tmp_path / f"{ranks}" / "run" / "metrics.jsonl").read_text().splitlines()
        measured = [json.loads(line) for line in text]
        assert sum("loss" in line for line in measured) == 5  # no step's own line is lost
        lines[ranks] = {}
        for line in measured:
            lines[ranks].setdefault(line["step"], {}).update(line)
    one, two = lines[1], lines[2]
    keys = {key for line in one.values() for key in line if "/" in key or key.startswith("preserve")}
    assert len(keys) == 5 * 8 + 3
    for step in (0, 2, 4, 5):
        assert one[step].keys() == two[step].keys()
        assert {key for key in one[step] if key.startswith("preserve")} == {
            "preserve_loss",
            "preserve_perplexity",
            "preserve_accuracy",
        }
        for key in keys & one[step].keys():
            assert two[step][key] == pytest.approx(one[step][key], rel=1e-3, abs=1e-12), (step, key)
        assert one[step]["preserve_perplexity"] == pytest.approx(math.exp(one[step]["preserve_loss"]))
    assert not any("/" in key for key in one[3])
    assert one[0]["spectral_norm/all"] == 0.0 < one[2]["spectral_norm/all"] < one[5]["spectral_norm/all"]

    run = tmp_path / "2" / "run"
    adapter = read_adapter(run / "adapter")
    from harness.config import load_config

    base = base_model(load_config(run / "config.yaml"))
    expected = by_type(
        {
            layer: dense_reference(
                factor.scaling * factor.B.double() @ factor.A.double(),
                base.get_submodule(layer).weight.detach().double(),
                8,
            )
            for layer, factor in adapter.items()
        }
    )
    for key, value in expected.items():
        assert two[5][key] == pytest.approx(value, rel=1e-4), key
