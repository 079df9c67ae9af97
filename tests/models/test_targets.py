"""Which layers are adapted."""

from pathlib import Path

import pytest
from torch import nn

from harness.config import ModelConfig
from harness.errors import UserError
from harness.models.loading import load_model
from harness.models.targets import Layer, describe, target_modules

NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
NAMES += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def model(random_base: Path) -> nn.Module:
    return load_model(ModelConfig(path=str(random_base), dtype="float32"))


def test_all_linear_leaves_the_output_embedding_out(model: nn.Module) -> None:
    found = target_modules(model, "all-linear")
    assert list(found) == [f"model.layers.{i}.{name}" for i in range(2) for name in NAMES]


def test_lists(model: nn.Module) -> None:
    assert list(target_modules(model, ["v_proj", "q_proj"])) == [
        f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")
    ]
    one = "model.layers.1.mlp.up_proj"
    assert list(target_modules(model, [one])) == [one]


def test_unknown(model: nn.Module) -> None:
    for target in ("q_prj", "lm_head", "proj", "model.layers.2.mlp.up_proj"):
        with pytest.raises(UserError, match=rf"^model\.target_modules: '{target}' matches no linear layer; allowed: "):
            target_modules(model, ["v_proj", target])


def test_shapes(model: nn.Module, random_base: Path) -> None:
    layers = describe(target_modules(model, ["q_proj", "down_proj"]))
    assert layers[:2] == [
        Layer("model.layers.0.self_attn.q_proj", 64, 64),
        Layer("model.layers.0.mlp.down_proj", 64, 160),
    ]
