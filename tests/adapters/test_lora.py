"""Plain PEFT adapters: ranks that differ by layer, round trips, residual weights."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from harness.adapters.lora import (
    attach_lora,
    load_factors,
    lora_config,
    lora_layers,
    read_adapter,
    subtract_from_base,
    write_adapter,
)
from harness.config import ModelConfig
from harness.methods.base import LowRank
from harness.models.loading import load_model
from harness.models.targets import target_modules


def load(base: Path, dtype: str = "float32") -> nn.Module:
    return load_model(ModelConfig(path=str(base), dtype=dtype))


def mixed_factors(model: nn.Module, scaling: float, size: float = 0.05) -> dict[str, LowRank]:
    """Factors of rank 1 to 5 in turn; the third layer of each block gets none."""
    generator = torch.Generator().manual_seed(7)
    factors = {}
    for number, (name, module) in enumerate(target_modules(model, "all-linear").items()):
        if number % 7 == 2:
            continue
        rank = 1 + number % 5
        factors[name] = LowRank(
            size * torch.randn(module.out_features, rank, generator=generator),
            size * torch.randn(rank, module.in_features, generator=generator),
            scaling,
        )
    return factors


@pytest.mark.parametrize("scaling", [1.0, 2.5, 1 / 3, 0.1])
def test_peft_alone_loads_ranks_that_differ(random_base: Path, tmp_path: Path, scaling: float) -> None:
    base = load(random_base)
    factors = mixed_factors(base, scaling)
    write_adapter(tmp_path, factors, str(random_base))
    model = PeftModel.from_pretrained(load(random_base), str(tmp_path))
    layers = lora_layers(model)
    assert layers.keys() == factors.keys()
    merged = model.merge_and_unload()
    originals = dict(base.named_modules())
    for name, module in target_modules(merged, "all-linear").items():
        update = factors[name].dense() if name in factors else torch.zeros_like(module.weight)
        assert torch.allclose(module.weight - originals[name].weight, update, atol=1e-6), name


@pytest.mark.parametrize("scaling", [1.0, 2.5, 1 / 3, 0.1])
def test_round_trip(random_base: Path, tmp_path: Path, scaling: float) -> None:
    factors = mixed_factors(load(random_base), scaling)
    write_adapter(tmp_path, factors, str(random_base))
    again = read_adapter(tmp_path)
    assert again.keys() == factors.keys()
    for name, factor in factors.items():
        assert torch.equal(again[name].A, factor.A)
        assert torch.equal(again[name].B, factor.B)
        assert again[name].scaling == pytest.approx(scaling, rel=1e-12)


def test_attached_ranks_and_scaling(random_base: Path) -> None:
    model = load(random_base)
    factors = mixed_factors(model, 2.5)
    ranks = {name: factor.A.shape[0] for name, factor in factors.items()} | {"model.layers.0.mlp.up_proj": 0}
    factors.pop("model.layers.0.mlp.up_proj", None)
    peft_model = attach_lora(model, ranks, 2.5)
    layers = lora_layers(peft_model)
    assert layers.keys() == factors.keys()
    load_factors(peft_model, factors)
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(2.5)
        assert torch.equal(layer.lora_A["default"].weight, factors[name].A)
        assert torch.equal(layer.lora_B["default"].weight, factors[name].B)


def test_names_that_contain_each_other() -> None:
    """Layer 1 and layer 11; `up` and `mlp.up`: a pattern for one must not catch the other."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.mlp = nn.ModuleDict({"up": nn.Linear(8, 8)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(12))

    model = Model()
    ranks = {name: 1 + number % 7 for number, name in enumerate(target_modules(model, "all-linear"))}
    del ranks["layers.1.up"]
    from peft.mapping import inject_adapter_in_model

    config = lora_config(ranks, 1.0)
    config.task_type = None
    inject_adapter_in_model(config, model)
    found = {
        name.removesuffix(".lora_A.default"): module.out_features
        for name, module in model.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert found == ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residual_is_computed_in_fp32_and_rounded_once(random_base: Path, dtype: torch.dtype) -> None:
    model = load(random_base, str(dtype).removeprefix("torch."))
    factors = mixed_factors(model, 2.5)
    before = {name: module.weight.clone() for name, module in target_modules(model, "all-linear").items()}
    peft_model = attach_lora(model, {name: f.A.shape[0] for name, f in factors.items()}, 2.5)
    subtract_from_base(peft_model, factors)
    for name, layer in lora_layers(peft_model).items():
        weight, factor = before[name], factors[name]
        expected = (weight.float() - 2.5 * (factor.B.float() @ factor.A.float())).to(dtype)
        assert torch.equal(layer.get_base_layer().weight, expected)
        assert layer.get_base_layer().weight.dtype == dtype
        if dtype == torch.bfloat16:  # rounding twice would show
            assert not torch.equal(weight - (2.5 * (factor.B @ factor.A)).to(dtype), expected)
    for name, module in target_modules(peft_model.get_base_model(), "all-linear").items():
        if name in before and name not in factors:
            assert torch.equal(module.weight, before[name])
