"""Layers that read the same tensor, seen and not guessed from names."""

from pathlib import Path

import pytest
import torch
from torch import nn

from harness.config import ModelConfig
from harness.models.loading import load_model
from harness.models.sharing import input_groups
from harness.models.targets import target_modules


def test_llama_has_four_inputs_per_block(random_base: Path) -> None:
    model = load_model(ModelConfig(path=str(random_base), dtype="float32"))
    modules = target_modules(model, "all-linear")
    groups = input_groups(model, modules, {"input_ids": torch.tensor([[3, 4, 5]]), "use_cache": False})
    expected = {}
    for block in ("model.layers.0", "model.layers.1"):
        for name in ("q", "k", "v"):
            expected[f"{block}.self_attn.{name}_proj"] = f"{block}.self_attn.q_proj"
        expected[f"{block}.self_attn.o_proj"] = f"{block}.self_attn.o_proj"
        for name in ("gate", "up"):
            expected[f"{block}.mlp.{name}_proj"] = f"{block}.mlp.gate_proj"
        expected[f"{block}.mlp.down_proj"] = f"{block}.mlp.down_proj"
    assert groups == expected
    assert len(set(groups.values())) == 8
    assert not any(module._forward_pre_hooks for module in modules.values())


class Misnamed(nn.Module):
    """q, k and v read three different tensors; two layers whose names have nothing in common read one."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))
        self.alpha, self.omega, self.unused = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = torch.tanh(x)
        total = self.q_proj(x) + self.k_proj(x * 1.0) + self.alpha(shared)
        own = x.clone()  # equal numbers in another tensor: equal by chance, for all that can be known
        return total + self.v_proj(own) + self.omega(shared)


def linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_names_mislead() -> None:
    model = Misnamed()
    groups = input_groups(model, linear(model), {"x": torch.ones(2, 4)})
    assert groups == {
        "q_proj": "q_proj",
        "k_proj": "k_proj",
        "v_proj": "v_proj",
        "alpha": "alpha",
        "omega": "alpha",
        "unused": "unused",
    }


class Chain(nn.Module):
    """Short-lived inputs: without care a later tensor gets the address, and the identity, of one that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(50))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x * 2)
        return x


def test_short_lived_tensors_are_not_confused() -> None:
    model = Chain()
    groups = input_groups(model, linear(model), {"x": torch.ones(1, 4)})
    assert len(set(groups.values())) == 50


class InPlace(nn.Module):
    """One tensor object, changed between the two layers that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.beside, self.after = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.before(x) + self.beside(x)
        return total + self.after(x.add_(1))


def test_changed_in_place_is_another_input() -> None:
    model = InPlace()
    groups = input_groups(model, linear(model), {"x": torch.ones(1, 4)})
    assert groups == {"before": "before", "beside": "before", "after": "after"}


def test_hooks_go_when_the_model_fails() -> None:
    model = Misnamed()
    with pytest.raises(TypeError):
        input_groups(model, linear(model), {"y": torch.ones(2, 4)})
    assert not any(module._forward_pre_hooks for module in linear(model).values())
