"""The null space of inputs: bottom eigenvectors, and how many of them have no energy at all."""

import pytest
import torch

from harness.decomposition.null_space import null_space
from tests.decomposition.reference import outlier_problem


@pytest.mark.parametrize("factor", [1.0, 60.0, 3000.0])
def test_bottom_eigenvectors(factor: float) -> None:
    _, C = outlier_problem(8, 256, 4000, factor=factor)
    values, vectors = torch.linalg.eigh(C.double())
    for directions in (1, 16, 256):
        space = null_space(C, directions)
        assert space.basis.shape == (256, directions)
        assert space.exact == 0
        projector = space.basis @ space.basis.T
        assert float((projector - vectors[:, :directions] @ vectors[:, :directions].T).norm()) <= 1e-9
        assert space.energy == pytest.approx(float(values[:directions].sum() / values.sum()), rel=1e-9)


@pytest.mark.parametrize("tokens", [40, 200])
@pytest.mark.parametrize("factor", [1.0, 60.0, 3000.0])
def test_fewer_tokens_than_channels(tokens: int, factor: float) -> None:
    """All directions that no token has are taken, however far some channels stand above the rest."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(tokens, 256, generator=generator)
    X[:, :3] *= factor
    X = torch.cat([X, X[: tokens // 2]])  # tokens seen twice span nothing new
    C = X.T @ X / len(X)
    space = null_space(C, 8)
    assert space.exact == 256 - tokens
    assert space.basis.shape == (256, 256 - tokens)
    assert space.energy <= 1e-6
    assert float((X.double() @ space.basis).norm() / X.double().norm()) <= 1e-3
    wider = null_space(C, 256 - tokens + 5)
    assert wider.basis.shape[1] == 256 - tokens + 5


def test_channels_that_are_always_zero() -> None:
    C = torch.diag(torch.tensor([0.0, 4.0, 0.0, 1.0]))
    space = null_space(C, 1)
    assert space.exact == 2
    assert torch.equal(space.basis @ space.basis.T, torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0])).double())
    assert null_space(torch.zeros(4, 4), 2).basis.shape == (4, 4)
    assert null_space(torch.zeros(4, 4), 2).energy == 0.0
