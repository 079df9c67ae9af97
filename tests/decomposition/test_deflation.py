"""The smallest components beside outliers: right where a Gram matrix is not, and refused where neither is."""

import pytest
import torch

from harness.decomposition.context_svd import GRAM_ERROR_LIMIT, component_factors, context_svd
from harness.decomposition.deflation import outlier_space, smallest_deflated
from harness.decomposition.gram import gram_matrix
from tests.decomposition.reference import outlier_problem, paper_block

RANK = 16


def relative_error(W: torch.Tensor, C: torch.Tensor, damping: float, solver: str) -> tuple[float, str, float]:
    cut = min(W.shape) - RANK
    shift = damping * float(C.diagonal().double().mean())
    found = context_svd(W, C, cut, solver, "rest", shift)
    B, A = component_factors(W, found)
    truth = paper_block(W, C, damping, RANK, "kpm")
    return float((B @ A - truth).norm() / truth.norm()), found.solver, found.gram_error


@pytest.mark.parametrize("factor", [8.0, 60.0, 300.0])
@pytest.mark.parametrize("shape", [(256, 256), (704, 256), (256, 704)])
@pytest.mark.parametrize("tokens", [4000, 60])
@pytest.mark.parametrize("damping", [0.01, 0.001])
def test_right_beside_outliers(factor: float, shape: tuple[int, int], tokens: int, damping: float) -> None:
    W, C = outlier_problem(*shape, tokens, factor=factor)
    error, solver, estimate = relative_error(W, C, damping, "auto")
    assert solver == "partial"
    assert error <= 1e-6
    assert error <= estimate <= GRAM_ERROR_LIMIT
    if factor == 60.0 and damping == 0.001 and tokens == 60:
        plain, _, _ = relative_error(W, C, damping, "gram")  # what it is for
        assert plain > 0.1


def test_equal_values_at_the_cut_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    sigma = torch.cat([torch.full((4,), 1e6), torch.linspace(3, 1, 228), torch.full((24,), 0.5)]).double()
    M = U * sigma @ V.T
    found = smallest_deflated(M, [8])
    assert found is None or found.gram_error > GRAM_ERROR_LIMIT
    whole = smallest_deflated(M, [24])
    assert whole is not None and whole.gram_error <= GRAM_ERROR_LIMIT
    assert (whole.vectors @ whole.vectors.T - U[:, 232:] @ U[:, 232:].T).norm() <= 1e-6


@pytest.mark.parametrize("outlier", [70.0, 1e3, 1e8])
def test_the_space_holds_the_outliers_and_nothing_of_the_smallest(outlier: float) -> None:
    """Seven singular values stand out, beside a bulk that falls to a hundredth."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(300, 256, generator=generator, dtype=torch.float64))[0]
    sigma = torch.cat([torch.linspace(3, 1, 7) * outlier, torch.linspace(1, 0.01, 249)]).double()
    M = U * sigma @ V.T
    space = outlier_space(M)
    assert space is not None and space.basis.shape == (256, 7)
    assert (space.basis.T @ space.basis - torch.eye(7)).norm() <= 1e-12
    assert torch.allclose(space.coefficients, space.basis.T @ M, rtol=0, atol=1e-13 * float(sigma[0]))
    assert space.largest == pytest.approx(float(sigma[0]) ** 2)
    assert (space.basis.T @ U[:, -16:]).norm() <= 1e-9
    assert (U[:, :7] - space.basis @ (space.basis.T @ U[:, :7])).norm() <= 1e-6


@pytest.mark.parametrize("M", [torch.zeros(256, 300), torch.full((256, 300), float("nan"))])
def test_nothing_to_take_out(M: torch.Tensor) -> None:
    assert outlier_space(M.double()) is None


def test_without_outliers_it_is_not_asked() -> None:
    W, _ = outlier_problem(256, 256, 400, factor=1.0)
    assert outlier_space(W.double()) is None


@pytest.mark.parametrize("shape", [(5, 9), (256, 300), (700, 700)])
def test_gram_matrix(shape: tuple[int, int]) -> None:
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G = gram_matrix(M)
    assert torch.allclose(G, M @ M.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(G, G.T)
