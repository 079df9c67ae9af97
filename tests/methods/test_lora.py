"""LoRA's tensors at step 0, and what the registry knows."""

import math

import pytest
import torch

from harness.errors import UserError
from harness.methods.base import LowRank, Method
from harness.methods.lora import LoRA, LoRAOptions
from harness.methods.registry import build_method, method_class, method_names
from harness.models.targets import Layer

LAYER = Layer("model.layers.0.mlp.up_proj", 64, 100)


def start(seed: int = 0, layer: Layer = LAYER) -> tuple[torch.Tensor, torch.Tensor]:
    initial = LoRA(LoRAOptions(rank=8), seed).initialise(layer, torch.zeros(64, 100), 8, None, {})
    assert not initial.residual
    return initial.A, initial.B


def test_kaiming_uniform_and_zero() -> None:
    A, B = start()
    assert torch.equal(B, torch.zeros(64, 8))
    assert A.shape == (8, 100)
    assert float(A.abs().max()) <= 0.1
    assert float(A.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.1)


def test_depends_on_seed_and_layer_alone() -> None:
    torch.manual_seed(1)
    first = start()[0]
    torch.manual_seed(2)
    assert torch.equal(start()[0], first)
    assert not torch.equal(start(seed=1)[0], first)
    assert not torch.equal(start(layer=Layer("model.layers.1.mlp.up_proj", 64, 100))[0], first)


def test_delta() -> None:
    """s·(BA − B₀A₀) in factored form."""
    generator = torch.Generator().manual_seed(0)
    trained, initial = (
        LowRank(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator), 0.5) for _ in range(2)
    )
    method = Method(None)
    assert method.delta(trained, None) is trained
    update = method.delta(trained, initial)
    assert update.A.shape == (4, 5)
    assert torch.allclose(update.dense(), trained.dense() - initial.dense(), atol=1e-6)


def test_registry() -> None:
    assert {"lora", "corda", "full"} <= set(method_names())
    for name in method_names():
        assert method_class(name).summary
        assert method_class(name).paper
    assert build_method({"name": "lora", "rank": 4, "alpha": 8.0}, 3).scaling() == 2.0
    with pytest.raises(UserError, match=r"^method\.name: 'base' given; allowed: .*corda, .*full, .*lora, "):
        method_class("base")
