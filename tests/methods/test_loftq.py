"""LoftQ: Algorithm 1 of the paper, written out with numpy's SVD, and whole runs over an NF4 base."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from harness.adapters.lora import read_adapter
from harness.config import ModelConfig, resolve
from harness.errors import UserError
from harness.files import read_json
from harness.methods.base import AdapterInit
from harness.methods.loftq import LoftQ, LoftQOptions
from harness.models.quantisation import nf4_values
from harness.models.targets import Layer
from harness.preflight import check
from tests.methods.formulas import SHAPES, weight_of
from tests.methods.runs import largest, live_model, logits, perturb, step_zero, write_checkpoint

pytest.importorskip("bitsandbytes")


def paper(W: torch.Tensor, rank: int, iterations: int, double: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Q_T, block T−1, block T), float64: quantise what the last block leaves, take the next from what is missing."""
    block = previous = torch.zeros(W.shape, dtype=torch.float64)
    Q = W.double()
    for _ in range(iterations):
        previous = block
        Q = nf4_values((W.float() - previous.float()).to(W.dtype), double).double()
        U, sigma, Vh = np.linalg.svd((W.double() - Q).numpy(), full_matrices=False)
        block = torch.from_numpy(U[:, :rank] * sigma[:rank] @ Vh[:rank])
    return Q, previous, block


def start(W: torch.Tensor, dtype: str = "float32", double: bool = True, **options: Any) -> tuple[LoftQ, AdapterInit]:
    model = ModelConfig(path="x", dtype=dtype, quantization="nf4", double_quantization=double)
    method = LoftQ(LoftQOptions(**options), 0, model)
    return method, method.initialise(Layer("layer", *W.shape), W, options["rank"], None, {})


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("kind", "dtype"), [("outliers", "float32"), ("deficient", "float32"), ("half", "bfloat16")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_papers_algorithm(shape: tuple[int, int], kind: str, dtype: str, double: bool) -> None:
    W = weight_of(shape, kind)
    for iterations, alpha in ((1, None), (2, 4.0), (5, None)):
        method, initial = start(W, dtype, double, rank=16, iterations=iterations, alpha=alpha)
        Q, previous, block = paper(W, 16, iterations, double)
        B, A = initial.subtracted
        subtracted = method.scaling() * (B.double() @ A.double())
        adapter = method.scaling() * (initial.B.double() @ initial.A.double())
        assert not initial.residual
        # NF4 rounds to one of 16 values: where a weight lies on the edge, rounding of the block tips it over. Few do.
        tolerance = 1e-6 if iterations == 1 else 0.02
        assert float((adapter - block).norm() / block.norm()) <= tolerance
        assert float((subtracted - previous).norm()) <= tolerance * float(block.norm())
        # What the layer computes at step 0 against the weight.
        frozen = nf4_values((W.float() - subtracted.float()).to(W.dtype), double).double()
        left = float((W.double() - frozen - adapter).norm() / W.double().norm())
        assert left == pytest.approx(float((W.double() - Q - block).norm() / W.double().norm()), rel=1e-2)
        assert initial.report["errors"][-1] == pytest.approx(left, rel=1e-5)
        assert len(initial.report["errors"]) == iterations


def test_nearer_the_weight_than_quantisation_alone() -> None:
    W = weight_of((160, 64), "outliers")
    plain = float((W - nf4_values(W, True)).norm() / W.norm())
    errors = start(W, rank=16)[1].report["errors"]
    assert len(errors) == 5  # the default
    assert errors[0] < 0.8 * plain
    assert errors[-1] < errors[0]


def test_first_iteration_takes_nothing_out() -> None:
    """But says so with a pair of zeros: the original model is then the one with the initial adapter in place."""
    initial = start(weight_of((64, 160), "outliers"), rank=8, iterations=1)[1]
    assert initial.subtracted is not None
    assert not any(factor.any() for factor in initial.subtracted)


def test_needs_a_quantised_base(base_config: dict[str, Any]) -> None:
    base_config["method"] = {"name": "loftq", "rank": 8}
    with pytest.raises(UserError, match=r"^model\.quantization: none given; method 'loftq' .*; use nf4"):
        check(resolve(base_config))
    base_config["model"]["quantization"] = "nf4"
    check(resolve(base_config))


@pytest.mark.parametrize("iterations", [1, 3])
def test_whole_run(base_config: dict[str, Any], iterations: int) -> None:
    """Weights nearer the base's than QLoRA's; step 0 is the anchor's original; exports compute as the live model."""
    from harness.adapters.lora import original_model
    from harness.stages.export import export

    base_config["model"]["quantization"] = "nf4"
    config, run = step_zero(base_config, {"name": "loftq", "rank": 8, "alpha": 4.0, "iterations": iterations}, "loftq")
    qlora = step_zero(base_config, {"name": "lora", "rank": 8}, "qlora")
    model = live_model(config, run)
    at_start = logits(model)
    report, plain = (read_json(place.init / "report.json")["layers"] for place in (run, qlora[1]))
    for name, layer in report.items():
        assert layer["weight_error"] == pytest.approx(layer["errors"][-1], rel=1e-4)
        assert layer["weight_error"] < plain[name]["weight_error"]

    perturb(model)
    live = logits(model)
    with original_model(model):
        assert largest(logits(model), at_start) <= 1e-4 * float(live.abs().max())
    assert largest(live, at_start) > 0.1
    write_checkpoint(model, run)
    export(config, run)
    assert largest(by_peft(run.frozen_base, run.adapter), live) <= 3e-4 * float(live.abs().max())
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float64).eval()
    assert largest(logits(merged), live) <= 3e-4 * float(live.abs().max())
    assert {factor.A.shape[0] for factor in read_adapter(run.adapter).values()} == {8}


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return logits(PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).double().eval())
