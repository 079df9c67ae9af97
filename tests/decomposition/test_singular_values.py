"""Singular values of W·C̃ without vectors, and the reference's damping rule."""

from functools import cache

import numpy as np
import pytest
import torch

from harness.decomposition.context_svd import damped, reference_damping, singular_values
from tests.decomposition.reference import outlier_problem

SHAPES = [(256, 256), (704, 256), (256, 704)]
problem = cache(outlier_problem)


def relative_errors(W: torch.Tensor, C: torch.Tensor, damping: float, solver: str) -> torch.Tensor:
    expected = torch.linalg.svd(W.double() @ damped(C, damping))[1]
    found = singular_values(W, damped(C, damping), solver)
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert (found.diff() <= 0).all()
    return (found - expected).abs() / expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [4000, 60], ids=["full covariance", "rank-deficient covariance"])
@pytest.mark.parametrize("factor", [1.0, 60.0, 300.0])
def test_every_value_is_right(shape: tuple[int, int], tokens: int, factor: float) -> None:
    W, C = problem(*shape, tokens, factor=factor)
    for damping in (0.01, 1e-4):
        assert float(relative_errors(W, C, damping, "auto").max()) <= 2e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fallback_is_needed_and_taken(shape: tuple[int, int]) -> None:
    W, C = problem(*shape, 60, factor=300.0)
    assert float(relative_errors(W, C, 1e-4, "gram").max()) > 0.1
    assert float(relative_errors(W, C, 1e-4, "auto").max()) <= 2e-5


def test_zero_and_deficient_weights() -> None:
    _, C = outlier_problem(32, 48, 4000)
    assert torch.equal(singular_values(torch.zeros(32, 48), damped(C, 0.01)), torch.zeros(32, dtype=torch.float64))
    W = torch.zeros(32, 48)
    W[0] = 1.0
    sigma = singular_values(W, damped(C, 0.01))
    assert float(sigma[1]) <= 1e-12 * float(sigma[0])


def direct_reference_damping(C: torch.Tensor) -> float:
    """The rule step by step in numpy's fp32: 1 % of the mean diagonal, twice as much until ‖C̃ C̃⁻¹ − I‖ < 0.05."""
    matrix = C.numpy().astype(np.float32)
    identity, damping = np.eye(len(matrix), dtype=np.float32), 0.01
    while True:
        C_damped = matrix + np.float32(damping) * np.diag(matrix).mean() * identity
        if np.sqrt(((C_damped @ np.linalg.inv(C_damped) - identity) ** 2).sum()) < 0.05:
            return damping
        damping *= 2


@pytest.mark.parametrize(("cancelled", "expected"), [((), 0.01), ((1,), 0.02), ((1, 2, 4), 0.08)], ids=str)
def test_reference_damping(cancelled: tuple[int, ...], expected: float) -> None:
    """C̃ is singular at each damping that an eigenvalue of C cancels, so the rule doubles past it."""
    size = 96
    mean = (size - len(cancelled)) / (size + 0.01 * sum(cancelled))  # of all eigenvalues, the others being 1
    eigenvalues = torch.ones(size, dtype=torch.float64)
    eigenvalues[: len(cancelled)] = -0.01 * mean * torch.tensor(cancelled, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    C = (Q * eigenvalues @ Q.T).float()
    assert reference_damping(C) == direct_reference_damping(C) == expected
    assert reference_damping(1024 * C) == expected  # a share of the mean diagonal, not a number


def test_reference_damping_leaves_outliers_alone() -> None:
    _, C = outlier_problem(8, 256, 60)
    assert reference_damping(C) == direct_reference_damping(C) == 0.01


@pytest.mark.parametrize("C", [torch.zeros(3, 3), torch.full((3, 3), float("nan"))], ids=["zero", "NaN"])
def test_reference_damping_ends(C: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="all zero or not finite"):
        reference_damping(C)
