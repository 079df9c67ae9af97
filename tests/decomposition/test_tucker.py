"""Mode products against sums written out."""

import itertools

import pytest
import torch

from harness.decomposition.tucker import mode_product, tucker_product


def written_out(core: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    """Σ over all core entries, one entry of the result at a time, in float64."""
    result = torch.zeros([len(factor) for factor in factors], dtype=torch.float64)
    for place in itertools.product(*map(range, result.shape)):
        for inner in itertools.product(*map(range, core.shape)):
            term = core[inner].double()
            for factor, i, j in zip(factors, place, inner, strict=True):
                term = term * factor[i, j].double()
            result[place] += term
    return result


@pytest.mark.parametrize(
    "shape", [((4, 3), (2, 2)), ((4, 3), (5, 2)), ((3, 4, 2), (2, 3, 2)), ((3, 2, 3, 2), (2, 2, 1, 2))]
)
def test_product(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    core[0] *= 60
    factors = [torch.randn(i, j, generator=generator, dtype=torch.float64) for i, j in zip(*shape, strict=True)]
    assert torch.allclose(tucker_product(core, factors), written_out(core, factors), atol=1e-12, rtol=1e-12)


def test_mode_product_keeps_the_other_modes_in_place() -> None:
    tensor = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    factor = torch.randn(7, 4, dtype=torch.float64)
    found = mode_product(tensor, factor, 2)
    assert found.shape == (2, 3, 7, 5)
    assert torch.allclose(found, torch.einsum("abcd,xc->abxd", tensor, factor))
    # Products along different modes commute.
    other = torch.randn(6, 3, dtype=torch.float64)
    left = mode_product(mode_product(tensor, factor, 2), other, 1)
    assert torch.allclose(left, mode_product(mode_product(tensor, other, 1), factor, 2), atol=1e-12)
