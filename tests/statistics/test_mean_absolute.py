"""Mean |x| per channel against a direct computation: batch sizes, padding sides; what stops it."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from harness.config import ModelConfig
from harness.data.collation import collate
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.models.loading import load_model
from harness.models.sharing import input_groups
from harness.models.targets import target_modules
from harness.statistics.mean_absolute import collect_mean_absolute_input
from tests.statistics.direct import PAD, make_rows


@pytest.fixture(scope="module")
def model(random_base: Path) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(random_base), dtype="float32"))


@pytest.fixture(scope="module")
def groups(model: PreTrainedModel) -> dict[str, str]:
    modules = target_modules(model, "all-linear")
    return input_groups(model, modules, {"input_ids": torch.tensor([[3, 4, 5]]), "use_cache": False})


@pytest.fixture(scope="module")
def direct(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every layer for itself, in float64, over unpadded batches of one."""
    sums = {name: torch.zeros(m.in_features).double() for name, m in target_modules(model, "all-linear").items()}

    def add(name: str, inputs: torch.Tensor) -> None:
        sums[name] += inputs[0].double().abs().sum(0)

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, module in target_modules(model, "all-linear").items()
    ]
    rows = make_rows(20)
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    return {name: vector / sum(len(row.input_ids) for row in rows) for name, vector in sums.items()}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_direct(
    model: PreTrainedModel, groups: dict[str, str], direct: dict[str, torch.Tensor], batch_size: int, side: str
) -> None:
    rows = make_rows(20)
    batches = (collate(rows[i : i + batch_size], PAD, side) for i in range(0, len(rows), batch_size))
    found = collect_mean_absolute_input(model, target_modules(model, "all-linear"), groups, batches)
    assert found.keys() == set(groups.values())
    for layer, expected in direct.items():
        vector = found[groups[layer]]
        assert vector.dtype == torch.float32 and vector.shape == expected.shape
        assert float(((vector - expected).abs() / expected).max()) <= 1e-4


def test_refusals(model: PreTrainedModel, groups: dict[str, str]) -> None:
    modules = target_modules(model, "all-linear")
    with pytest.raises(UserError, match="no real token"):
        collect_mean_absolute_input(model, modules, groups, [])
    weight = model.get_input_embeddings().weight
    kept = weight[7].detach().clone()
    with torch.no_grad():
        weight[7] = float("nan")
    try:
        with pytest.raises(UserError, match=r"^statistics: NaN or inf in the input of layer model\.layers\.0"):
            collect_mean_absolute_input(model, modules, groups, [collate([Row([3, 7], [])], PAD)])
    finally:
        with torch.no_grad():
            weight[7] = kept
    assert not any(module._forward_pre_hooks for module in modules.values())
