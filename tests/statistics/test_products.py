"""Sums of products against float64: outlier channels, odd sizes, dtypes."""

import pytest
import torch

from harness.statistics.products import CPU_BLOCK, UpperTriangle, add_product

CPU = torch.device("cpu")


def rows_of(count: int, width: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    rows[:, :2] *= 60
    return rows


@pytest.mark.parametrize("width", [1, 7, CPU_BLOCK, CPU_BLOCK + 3, 2 * CPU_BLOCK + 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram(width: int, dtype: torch.dtype) -> None:
    """Over batches of any size, an empty one too, within 1e-6 of the float64 sum of the very same rows."""
    batches = [rows_of(count, width, count).to(dtype) for count in (40, 1, 0, 133)]
    expected = sum(rows.double().T @ rows.double() for rows in batches)
    triangle = UpperTriangle(width, CPU)
    for rows in batches:
        triangle.add(rows)
    assert float(triangle.trace()) == pytest.approx(float(expected.trace()), rel=1e-5)
    total = triangle.whole()
    assert torch.equal(total, total.T)
    assert float((total - expected).norm() / expected.norm()) <= 1e-6
    scale = (expected.diagonal()[:, None] * expected.diagonal()[None, :]).sqrt()
    assert float(((total - expected).abs() / scale).max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product(dtype: torch.dtype) -> None:
    left, right = rows_of(90, 31, 0).to(dtype), rows_of(90, 17, 1).to(dtype)
    total = torch.ones(31, 17)
    add_product(total, left, right)
    expected = 1 + left.double().T @ right.double()
    assert float((total - expected).norm() / expected.norm()) <= 1e-6


def test_fp16_products_do_not_overflow() -> None:
    triangle = UpperTriangle(3, CPU)
    triangle.add(torch.full((5, 3), 6e4, dtype=torch.float16))
    assert triangle.whole().isfinite().all()


def test_half_of_it_is_held() -> None:
    """The blocks cover what is on and above the diagonal once, and `whole` gives them up."""
    size = 4 * CPU_BLOCK + 5
    triangle = UpperTriangle(size, CPU)
    held = sum(block.numel() for block in triangle.blocks)
    assert held == UpperTriangle.numbers(size, CPU) and size**2 / 2 < held < 0.63 * size**2
    for block in triangle.blocks:
        block += 1
    assert torch.equal(triangle.whole(), torch.ones(size, size))
    assert triangle.blocks == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_trace(bad: float) -> None:
    rows = torch.ones(4, CPU_BLOCK + 3)
    for channel in (0, CPU_BLOCK - 1, CPU_BLOCK + 2):
        triangle = UpperTriangle(rows.shape[1], CPU)
        triangle.add(rows.index_fill(1, torch.tensor([channel]), bad))
        assert not triangle.trace().isfinite()


def test_what_was_set_for_bf16_rows_is_set_no_longer() -> None:
    UpperTriangle(3, CPU).add(torch.ones(2, 3, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
