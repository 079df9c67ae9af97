"""Fisher blocks of A and B against float64 loops, for any batch size, padding side and number of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from harness.config import ModelConfig
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.models.loading import load_model
from harness.statistics.adapter_curvature import diagonal_fisher, kronecker_factors, linear_pairs, trained_weights
from tests.gangs import REPOSITORY
from tests.statistics.direct_curvature import (
    adapted,
    batches,
    direct_diagonal,
    direct_factors,
    groups_of,
    labelled_rows,
)

ROWS = labelled_rows(9)  # uneven; some without a label
# Padding on the left moves positions, and transformers computes rotary embeddings in fp32 whatever the model's dtype.
TOLERANCE = {"right": 1e-6, "left": 1e-3}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model(random_base: Path) -> torch.nn.Module:
    return adapted(random_base)


@pytest.fixture(scope="module")
def diagonal(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return direct_diagonal(model, ROWS)


@pytest.fixture(scope="module")
def factors(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return direct_factors(model, ROWS)


@pytest.mark.parametrize(("size", "side"), [(1, "right"), (4, "right"), (4, "left"), (9, "right")])
def test_diagonal(model: torch.nn.Module, diagonal: dict[str, torch.Tensor], size: int, side: str) -> None:
    found = diagonal_fisher(model, batches([r for r in ROWS if any(x != IGNORED for x in r.labels[1:])], size, side))
    assert found.keys() == diagonal.keys() == trained_weights(model).keys()
    assert max(relative(found[name], diagonal[name]) for name in found) <= TOLERANCE[side]
    assert all(weight.requires_grad and weight.grad is None for weight in trained_weights(model).values())
    assert not model.training


@pytest.mark.parametrize(("size", "side"), [(1, "right"), (4, "left")])
def test_factors(model: torch.nn.Module, factors: dict[str, dict[str, torch.Tensor]], size: int, side: str) -> None:
    rows = [row for row in ROWS if any(label != IGNORED for label in row.labels[1:])]
    groups = groups_of(model)
    found = kronecker_factors(model, linear_pairs(model), groups, batches(rows, size, side), cross=True)
    assert len(found["A00"]) == 8 and len(groups) == 14  # of two blocks, whose q, k, v and gate, up share one
    for factor, named in factors.items():
        for layer, expected in named.items():
            assert relative(found[factor][groups[layer] if factor == "A00" else layer], expected) <= TOLERANCE[side], (
                factor
            )


def test_rows_without_a_label_are_no_sequences(model: torch.nn.Module, diagonal: dict[str, torch.Tensor]) -> None:
    assert any(all(label == IGNORED for label in row.labels[1:]) for row in ROWS)
    found = diagonal_fisher(model, batches(ROWS, 4))
    assert max(relative(found[name], diagonal[name]) for name in found) <= 1e-6


def test_zero_b(random_base: Path) -> None:
    """Only B has a precision; and it is that of the direct computation, where A's is zero."""
    model = adapted(random_base, zero_b=True)
    expected = direct_diagonal(model, ROWS)
    found = diagonal_fisher(model, batches(ROWS, 4))
    assert {name for name, block in expected.items() if block.any()} == found.keys()
    assert all(".lora_B." in name for name in found) and len(found) == 14
    assert max(relative(found[name], expected[name]) for name in found) <= 1e-6
    made = kronecker_factors(model, linear_pairs(model), groups_of(model), batches(ROWS, 4), cross=True)
    assert {factor: len(named) for factor, named in made.items() if named} == {"A11": 14, "G22": 14}


def test_another_form_goes_row_by_row(random_base: Path) -> None:
    """DoRA trains magnitudes too: its diagonal comes one sequence at a time."""
    base = load_model(ModelConfig(path=str(random_base), dtype="float32"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True)).double().eval()
    assert linear_pairs(model) is None
    expected = direct_diagonal(model, ROWS)
    found = diagonal_fisher(model, batches(ROWS, 4))
    assert len(found) == len(expected) == 12
    for name, block in found.items():
        direct = expected[name if name in expected else f"{name}.weight"]
        assert torch.allclose(block, direct, rtol=1e-6, atol=1e-12 * float(direct.max()))


def test_nan_names_layer_and_batch(random_base: Path) -> None:
    model = adapted(random_base, dtype=torch.float32)
    next(
        m for n, m in model.named_modules() if n.endswith("layers.1.mlp.up_proj.lora_B.default")
    ).register_forward_hook(lambda _, inputs, output: output * (float("nan") if len(inputs[0]) == 2 else 1.0))
    rows = [Row([3, 4, 5], [3, 4, 5])] * 5
    for compute in (
        lambda: diagonal_fisher(model, batches(rows, 3)),
        lambda: kronecker_factors(model, linear_pairs(model), groups_of(model), batches(rows, 3), cross=False),
    ):
        with pytest.raises(UserError, match=r"^statistics: NaN or inf in .*, batch 1; try model.dtype: float32"):
            compute()


def test_no_label_at_all(model: torch.nn.Module) -> None:
    with pytest.raises(UserError, match="no sampled row has a labelled token"):
        diagonal_fisher(model, batches([Row([3, 4], [IGNORED, IGNORED])], 1))


@pytest.mark.slow
def test_equal_for_any_number_of_ranks(random_base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.statistics.direct_curvature", str(random_base), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    one = load_file(tmp_path / "1-0.safetensors")
    for ranks in (2, 3):
        first = load_file(tmp_path / f"{ranks}-0.safetensors")
        assert first.keys() == one.keys()
        assert max(relative(first[key], one[key]) for key in one) <= 1e-5
        for number in range(1, ranks):
            other = load_file(tmp_path / f"{ranks}-{number}.safetensors")
            assert all(torch.equal(other[key], first[key]) for key in first)
