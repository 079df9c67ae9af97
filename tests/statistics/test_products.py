"""Sums of products against float64: outlier channels, odd sizes, dtypes."""

import pytest
import torch

from harness.statistics.products import CPU_BLOCK, add_gram, add_product, mirror, row_blocks


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
    total = torch.zeros(width, width)
    for rows in batches:
        add_gram(total, rows)
    mirror(total)
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
    total = torch.zeros(3, 3)
    add_gram(total, torch.full((5, 3), 6e4, dtype=torch.float16))
    assert total.isfinite().all()


def test_what_is_not_there_is_not_multiplied() -> None:
    """Below the blocks of the diagonal the accumulator is not touched, and the blocks cover the rest once."""
    total = torch.zeros(2 * CPU_BLOCK + 5, 2 * CPU_BLOCK + 5)
    for upper, _ in row_blocks(total):
        upper += 1
    assert float(total.max()) == 1.0 and float(total.triu().sum()) == len(total) * (len(total) + 1) / 2
    assert not total[CPU_BLOCK:, :CPU_BLOCK].any()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # what was set for bf16 rows is set no longer
