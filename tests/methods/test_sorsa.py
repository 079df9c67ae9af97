"""SORSA: tensors of step 0, penalty and update against float64; the residual weight; training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.adapters.lora import SIGMA, original_model, read_layers
from harness.config import resolve
from harness.errors import UserError
from harness.files import read_json
from harness.methods.base import LowRank
from harness.methods.registry import build_method
from harness.methods.sorsa import SORSA, SORSAOptions
from harness.models.targets import Layer
from harness.stages.initialise import subtracted_blocks
from harness.stages.train import build_model
from harness.training.checkpoint import trained_parameters
from tests.methods.formulas import SHAPES, pissa, weight_of
from tests.methods.runs import base_model, largest, live_model, logits, perturb, step_zero
from tests.training.test_runs import alone, largest_difference, trained

METHOD: dict[str, Any] = {"name": "sorsa", "rank": 5, "gamma": 0.3}


@pytest.mark.parametrize("kind", ["outliers", "deficient", "half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_0_and_update_against_float64(shape: tuple[int, int], kind: str) -> None:
    W, layer = weight_of(shape, kind), Layer("model.layers.0.mlp.up_proj", *shape)
    method = SORSA(SORSAOptions(rank=5))
    start = method.initialise(layer, W, 5, None, {})
    U, S, Vt = start.B.double(), start.extra[SIGMA].double(), start.A.double()
    expected = pissa(W, 5)
    assert (U * S @ Vt - expected).norm() <= 1e-6 * expected.norm()
    assert torch.allclose(S, torch.linalg.svdvals(W.double())[:5], rtol=1e-6)
    for gram in (U.T @ U, Vt @ Vt.T):
        assert (gram - torch.eye(5)).abs().max() <= 1e-6
    assert start.residual
    moved = {"lora_A.weight": start.A + 0.1, "lora_B.weight": start.B - 0.2, SIGMA: start.extra[SIGMA] + 1}
    initial = method.update(start.tensors(method.pair), None)
    assert isinstance(initial, LowRank)
    update = method.update(moved, initial).dense().double()
    after = moved["lora_B.weight"].double() @ torch.diag(moved[SIGMA].double()) @ moved["lora_A.weight"].double()
    assert (update - (after - U * S @ Vt)).norm() <= 1e-5 * after.norm()


def test_penalty_against_a_loop(base_config: dict[str, Any]) -> None:
    config, run = step_zero(base_config, METHOD, "penalty")
    method = build_method(config.method, 0)
    model = build_model(config, run, method, None, needs_original=False)
    assert method.penalty(model).item() <= 1e-6  # orthonormal at step 0
    perturb(model, 0.1)
    found = method.penalty(model)
    found.backward()
    terms, copies = [], []
    for name, parameter in trained_parameters(model):
        if not name.endswith(SIGMA):
            M = parameter.detach().double().requires_grad_()
            gram = M @ M.T if name.endswith("lora_A.weight") else M.T @ M
            terms.append(((gram - torch.eye(5, dtype=torch.float64)) ** 2).sum().sqrt())
            copies.append((parameter, M))
    expected = 0.3 * sum(terms) / len(terms)
    expected.backward()
    assert len(terms) == 28
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(torch.allclose(parameter.grad.double(), M.grad, atol=1e-7) for parameter, M in copies)


def test_residual_weight_and_original_model(base_config: dict[str, Any]) -> None:
    config, run = step_zero(base_config, METHOD, "residual")
    weights = {name: p.detach().double() for name, p in base_model(config).named_parameters()}
    for name, block in subtracted_blocks(run.init).items():
        expected = pissa(weights[f"{name}.weight"], 5)
        assert (block.dense().double() - expected).norm() <= 1e-6 * expected.norm()
    base, model = logits(base_model(config)), live_model(config, run)
    scale = float(base.abs().max())
    assert largest(logits(model), base) <= 1e-4 * scale
    perturb(model, 0.2)
    moved = logits(model)
    assert largest(moved, base) > 0.1
    with original_model(model):
        assert largest(logits(model), base) <= 1e-4 * scale
    assert torch.equal(logits(model), moved)


def test_over_a_quantised_base(base_config: dict[str, Any]) -> None:
    """The residual weight is quantised, so that step 0 is nearer to the base than the quantised base is."""
    pytest.importorskip("bitsandbytes")
    base_config["model"]["quantization"] = "nf4"
    errors = {}
    for method in (METHOD, {"name": "lora", "rank": 5}):
        config, run = step_zero(base_config, method, str(method["name"]))
        report = read_json(run.init / "report.json")["layers"]
        errors[method["name"]] = sum(layer["weight_error"] for layer in report.values())
        assert logits(live_model(config, run)).isfinite().all()
    assert errors["sorsa"] < errors["lora"]


def test_bad_options(base_config: dict[str, Any]) -> None:
    base_config["method"] = METHOD | {"gamma": -1.0}
    with pytest.raises(UserError, match=r"^method\.gamma: -1\.0 given; "):
        resolve(base_config)


@pytest.mark.slow
def test_zero_3_trains_as_zero_2(base_config: dict[str, Any], tmp_path: Path) -> None:
    base_config |= {"method": METHOD, "anchor": {"kl": 1.0, "prompts_per_step": 2}}
    train = base_config.pop("train") | {"max_steps": 4, "save_steps": 4, "log_steps": 1}
    runs = {
        zero: alone(base_config, tmp_path, f"zero{zero}", train={**train, "deepspeed": f"ds_configs/zero{zero}.json"})
        for zero in (2, 3)
    }
    assert largest_difference(trained(runs[2], 4), trained(runs[3], 4)) <= 1e-3
    start = {f"{layer}.{n}": t for layer, own in read_layers(runs[2] / "init").items() for n, t in own.items()}
    assert all(not torch.equal(start[name], value) for name, value in trained(runs[3], 4).items())
