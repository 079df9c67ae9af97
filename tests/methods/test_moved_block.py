"""What a report says of the block that was moved out of a weight, against dense float64."""

import pytest
import torch

from harness.methods.base import moved_block


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("magnitude", [1.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares(scaling: float, magnitude: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 80, generator=generator).to(dtype)
    B = torch.randn(48, 5, generator=generator, dtype=torch.float64) * magnitude
    A = torch.randn(5, 80, generator=generator, dtype=torch.float64)
    initial = moved_block(weight, B, A, scaling, {"solver": "gram"})
    block = B @ A
    stored = scaling * (initial.B.double() @ initial.A.double())
    assert initial.report["share_of_weight"] == pytest.approx(float(block.norm() / weight.double().norm()), rel=1e-12)
    # Four digits: what is compared is itself a difference in the eighth.
    assert initial.report["rounding_error"] == pytest.approx(float((stored - block).norm() / block.norm()), rel=1e-4)
    assert 1e-9 < initial.report["rounding_error"] < 1e-6
    assert initial.report["solver"] == "gram"


def test_nothing_moved() -> None:
    initial = moved_block(torch.zeros(4, 6), torch.zeros(4, 2).double(), torch.zeros(2, 6).double(), 1.0, {})
    assert initial.report == {"share_of_weight": 0.0, "rounding_error": 0.0}
