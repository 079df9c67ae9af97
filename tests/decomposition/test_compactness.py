"""log π and the covariance selection score against full decompositions in float64 (CorDA++, Eq. 6 and 7)."""

import math

import pytest
import torch

from harness.decomposition.compactness import log_compactness, selection_score
from harness.decomposition.context_svd import damped, singular_values
from tests.decomposition.reference import outlier_problem, paper_log_pi, paper_selection_score

SHAPES = [(256, 256), (704, 256), (256, 704)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [4000, 60], ids=["full covariance", "rank-deficient covariance"])
def test_equals_the_paper(shape: tuple[int, int], tokens: int) -> None:
    W, C = outlier_problem(*shape, tokens)
    for damping in (0.01, 1e-3):
        C_damped = damped(C, damping)
        log_pi = log_compactness(C_damped, shape[0])
        assert log_pi == pytest.approx(paper_log_pi(C_damped, shape[0]), rel=1e-9)
        expected = paper_selection_score(W, C, damping)
        for solver, tolerance in (("auto", 1e-8), ("gram", 1e-6)):
            sigma = singular_values(W, C_damped, solver)
            assert selection_score(sigma, log_pi) == pytest.approx(expected, rel=tolerance)


def test_by_hand() -> None:
    C = torch.diag(torch.tensor([4.0, 1.0, 0.25]))
    assert log_compactness(C, 9) == pytest.approx(math.log(math.sqrt(9 * 4.0) / 0.25))
    assert selection_score(torch.tensor([8.0, 4.0, 0.0]), 2.0) == 3.0


def test_bounds_the_output_shift() -> None:
    """Eq. 6: what truncating r components does to any output column is at most π(C)·σ_{-r}, with C = X·Xᵀ."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(24, 200, generator=generator, dtype=torch.float64)
    W = torch.randn(32, 24, generator=generator, dtype=torch.float64)
    C = X @ X.T
    U, sigma, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    pi = math.exp(log_compactness(C, 32))
    for r in (1, 5, 20):
        shift = U[:, -r:] @ torch.diag(sigma[-r:]) @ Vh[-r:] @ torch.linalg.inv(C) @ X
        assert float(shift.abs().sum(0).max()) <= pi * float(sigma[-r])


def test_weight_of_zero_and_singular_covariance_stay_finite() -> None:
    assert selection_score(torch.zeros(4), 7.0) == 0.0
    assert math.isfinite(log_compactness(torch.ones(4, 4), 4))
