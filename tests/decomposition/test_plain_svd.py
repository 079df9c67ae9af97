"""The plain SVD against torch's float64 SVD, on weights with outlier channels 60 times the rest."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness.decomposition.context_svd import GRAM_ERROR_LIMIT
from harness.decomposition.plain_svd import balanced_factors, oriented, plain_svd
from tests.decomposition.reference import outlier_problem

SHAPES = [(256, 256), (704, 256), (256, 704)]
BOUND = 1e-9


def direct_block(W: torch.Tensor, columns: slice) -> torch.Tensor:
    """U_r Σ_r V_rᵀ, (out, in), float64."""
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, columns] @ torch.diag(sigma[columns]) @ Vh[columns]


def chosen(W: torch.Tensor, rank: int, end: str) -> tuple[int, slice]:
    components = min(W.shape)
    return (rank, slice(0, rank)) if end == "top" else (components - rank, slice(components - rank, components))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_direct_svd(shape: tuple[int, int], end: str) -> None:
    W, _ = outlier_problem(*shape, 10)
    for rank in (1, 16, 64, 256):
        cut, columns = chosen(W, rank, end)
        decomposition = plain_svd(W, cut)
        B, A = balanced_factors(W, decomposition, columns)
        assert B.shape == (shape[0], rank)
        assert A.shape == (rank, shape[1])
        assert relative(B @ A, direct_block(W, columns)) <= BOUND
        sigma = torch.linalg.svdvals(W.double())
        assert relative(decomposition.sigma, sigma) <= BOUND
        # B = U_r Σ_r^½ and A = Σ_r^½ V_rᵀ, up to the sign of each pair.
        assert relative(B.T @ B, torch.diag(sigma[columns])) <= BOUND
        assert relative(A @ A.T, torch.diag(sigma[columns])) <= BOUND


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", ["auto", "gram", "svd"])
def test_solvers_agree_where_the_gram_matrix_is_allowed(shape: tuple[int, int], end: str, solver: str) -> None:
    W, _ = outlier_problem(*shape, 10)
    cut, columns = chosen(W, 16, end)
    decomposition = plain_svd(W, cut, solver)
    assert decomposition.solver == ("svd" if solver == "svd" else "gram")
    assert decomposition.side == ("left" if shape[0] <= shape[1] else "right")
    B, A = balanced_factors(W, decomposition, columns)
    assert relative(B @ A, direct_block(W, columns)) <= BOUND


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_auto_falls_back_where_the_gram_matrix_is_wrong(shape: tuple[int, int]) -> None:
    """Singular values from 1 to 1e-12: squared, the last third is rounding."""
    generator = torch.Generator().manual_seed(0)
    W = graded(shape, torch.logspace(0, -12, 256, dtype=torch.float64), generator)
    cut, columns = chosen(W, 16, "bottom")
    block = direct_block(W, columns)
    forced = plain_svd(W, cut, "gram")
    assert forced.gram_error > GRAM_ERROR_LIMIT
    B, A = balanced_factors(W, forced, columns)
    assert relative(B @ A, block) > 1e-3  # the fallback is needed, not merely taken
    found = plain_svd(W, cut)
    assert found.solver == "svd"
    B, A = balanced_factors(W, found, columns)
    assert relative(B @ A, block) <= 1e-3  # entries of W itself are rounded at 1e-16 of the largest
    # Of several cuts the worst one decides.
    assert plain_svd(W, 4).solver == "gram"
    assert plain_svd(W, (4, cut)).solver == "svd"


def graded(shape: tuple[int, int], sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A matrix with these singular values, float64."""
    sides = (torch.randn(size, len(sigma), generator=generator, dtype=torch.float64) for size in shape)
    U, V = (torch.linalg.qr(side)[0] for side in sides)
    return U * sigma @ V.T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_component_is_split_evenly_where_eigenvalues_are_rounding(shape: tuple[int, int]) -> None:
    """64 singular values of 1e-10: their squares are lost in the Gram matrix, the split of the factors is not."""
    sigma = torch.cat([torch.linspace(1, 0.5, 192), torch.full((64,), 1e-10)]).double()
    W = graded(shape, sigma, torch.Generator().manual_seed(0))
    decomposition = plain_svd(W, 192)
    assert decomposition.solver == "gram"
    B, A = balanced_factors(W, decomposition, slice(192, 256))
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-6)
    assert float(B.norm(dim=0).max()) <= 1.1e-5
    assert float((B @ A).norm()) == pytest.approx(8e-10, rel=1e-3)


@pytest.mark.parametrize("rank", [8, 100], ids=["inside the null space", "beyond the null space"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_deficient_weight(shape: tuple[int, int], rank: int) -> None:
    sigma = torch.cat([torch.logspace(1, -1, 192), torch.zeros(64)]).double()
    W = graded(shape, sigma, torch.Generator().manual_seed(0))
    cut, columns = chosen(W, rank, "bottom")
    B, A = balanced_factors(W, plain_svd(W, cut), columns)
    for factor in (B, A):
        assert factor.isfinite().all()
        assert factor.float().isfinite().all()
    if rank <= 64:
        assert (B @ A).norm() <= 1e-12 * W.norm()
    else:
        assert relative(B @ A, direct_block(W, columns)) <= BOUND


def test_zero_weight() -> None:
    W = torch.zeros(24, 16)
    B, A = balanced_factors(W, plain_svd(W, 4), slice(0, 4))
    assert B.isfinite().all()
    assert torch.equal(B @ A, torch.zeros(24, 16, dtype=torch.float64))


def test_signs_do_not_depend_on_the_solver() -> None:
    vectors = torch.tensor([[0.6, -0.8], [-0.8, 0.1]])
    assert torch.equal(oriented(vectors), torch.tensor([[-0.6, 0.8], [0.8, -0.1]]))
    W, _ = outlier_problem(48, 64, 10)
    gram, svd = (balanced_factors(W, plain_svd(W, 8, solver), slice(0, 8)) for solver in ("gram", "svd"))
    assert all(relative(left, right) <= 1e-6 for left, right in zip(gram, svd, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    out_features=st.integers(1, 24),
    in_features=st.integers(1, 24),
    share=st.floats(0, 1),
    end=st.sampled_from(["top", "bottom"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_rank(
    out_features: int, in_features: int, share: float, end: str, dtype: torch.dtype, seed: int
) -> None:
    W = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    components = min(W.shape)
    cut, columns = chosen(W, max(1, math.ceil(share * components)), end)
    if 0 < cut < components:
        sigma = torch.linalg.svdvals(W.double())
        assume(float(sigma[cut - 1] - sigma[cut]) > 1e-6 * float(sigma[0]))
    B, A = balanced_factors(W, plain_svd(W, cut), columns)
    assert relative(B @ A, direct_block(W, columns)) <= 1e-6
