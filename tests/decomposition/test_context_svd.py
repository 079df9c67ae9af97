"""CO-SVD against the paper's formulas in float64, on weights and inputs with outlier channels 60 times the rest."""

import math
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness.decomposition.context_svd import (
    GRAM_ERROR_LIMIT,
    ContextSVD,
    component_factors,
    context_svd,
    damped,
)
from tests.decomposition.reference import outlier_problem, paper_block

BOUND = 1e-5
DAMPING = 0.01
SHAPES = [(256, 256), (704, 256), (256, 704), (704, 600)]  # the last: a triangular factor of several blocks
Factors = tuple[torch.Tensor, torch.Tensor, ContextSVD]

problem = cache(outlier_problem)


def factors(W: torch.Tensor, C: torch.Tensor, rank: int, mode: str, solver: str = "auto") -> Factors:
    components = min(W.shape)
    cut = components - rank if mode == "kpm" else rank
    decomposition = context_svd(W, damped(C, DAMPING), cut, solver)
    columns = slice(cut, components) if mode == "kpm" else slice(0, cut)
    return *component_factors(W, decomposition, columns), decomposition


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [4000, 60], ids=["full covariance", "rank-deficient covariance"])
def test_equals_the_paper(shape: tuple[int, int], tokens: int, mode: str) -> None:
    W, C = problem(*shape, tokens)
    for rank in (1, 16, 64):
        B, A, _ = factors(W, C, rank, mode)
        block = paper_block(W, C, DAMPING, rank, mode)
        assert relative(B @ A, block) <= BOUND
        # What is stored: the factors in fp32.
        assert relative(B.float().double() @ A.float().double(), block) <= BOUND


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_components_give_the_weight_back(shape: tuple[int, int]) -> None:
    W, C = problem(*shape, 4000)
    B, A, _ = factors(W, C, min(shape), "ipm")
    assert relative(B @ A, W.double()) <= 1e-12


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solvers_agree_where_the_gram_matrix_is_allowed(shape: tuple[int, int], mode: str) -> None:
    W, C = outlier_problem(*shape, 4000, factor=1.0)
    rank = 16 if mode == "ipm" else min(shape) - 16
    block = paper_block(W, C, DAMPING, rank, mode)
    for solver in ("auto", "gram", "svd"):
        B, A, decomposition = factors(W, C, rank, mode, solver)
        assert decomposition.solver == ("svd" if solver == "svd" else "gram")
        assert relative(B @ A, block) <= BOUND


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_auto_falls_back_where_the_gram_matrix_is_wrong(shape: tuple[int, int]) -> None:
    W, C = problem(*shape, 60)
    block = paper_block(W, C, DAMPING, 16, "kpm")
    B, A, forced = factors(W, C, 16, "kpm", "gram")
    assert forced.gram_error > GRAM_ERROR_LIMIT
    assert relative(B @ A, block) > BOUND  # the fallback is needed, not merely taken
    B, A, chosen = factors(W, C, 16, "kpm")
    assert chosen.solver == "svd"
    assert relative(B @ A, block) <= BOUND


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_balanced(shape: tuple[int, int], mode: str) -> None:
    """B = U_r √Σ_r has orthogonal columns of length √σ; A·C̃ = √Σ_r V_rᵀ has orthogonal rows of length √σ."""
    W, C = problem(*shape, 4000)
    B, A, decomposition = factors(W, C, 16, mode)
    components = min(shape)
    sigma = decomposition.sigma[slice(components - 16, components) if mode == "kpm" else slice(0, 16)]
    rows = A @ damped(C, DAMPING)
    assert relative(B.T @ B, torch.diag(sigma)) <= 1e-9
    assert relative(rows @ rows.T, torch.diag(sigma)) <= BOUND


@pytest.mark.parametrize("rank", [8, 100], ids=["inside the null space", "beyond the null space"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_deficient_weight(shape: tuple[int, int], rank: int) -> None:
    """64 singular values are zero: the factors stay finite and the product is what the paper's formula tends to."""
    W, C = problem(*shape, 4000)
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    sigma[-64:] = 0
    W = U @ torch.diag(sigma) @ Vh
    B, A, _ = factors(W, C, rank, "kpm")
    assert B.isfinite().all()
    assert A.isfinite().all()
    assert B.float().isfinite().all()
    assert A.float().isfinite().all()
    if rank <= 64:  # the smallest components of a deficient weight are nothing at all
        assert (B @ A).norm() <= 1e-9 * W.norm()
    else:
        assert relative(B @ A, paper_block(W, C, DAMPING, rank, "kpm")) <= BOUND
    residual = W - B @ A
    assert relative(residual + B @ A, W) <= 1e-12


def test_zero_weight_has_a_zero_block() -> None:
    C = problem(256, 256, 60)[1]
    B, A, _ = factors(torch.zeros(256, 256), C, 8, "kpm")
    assert B.isfinite().all()
    assert torch.equal(B @ A, torch.zeros(256, 256, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_order_of_input_channels_is_irrelevant(shape: tuple[int, int], mode: str) -> None:
    W, C = problem(*shape, 4000)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(1))
    B, A, plain = factors(W, C, 16, mode)
    B_permuted, A_permuted, permuted = factors(W[:, order], C[order][:, order], 16, mode)
    # In the wider problem, about √ε of σ₁: what a Gram matrix leaves of the smallest.
    assert relative(permuted.sigma, plain.sigma) <= (1e-9 if min(shape) == 256 else 1e-8)
    assert relative(B_permuted @ A_permuted, (B @ A)[:, order]) <= 1e-7


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    C = torch.diag(torch.tensor([1.0, 2.0, 6.0]))
    assert torch.equal(damped(C, 0.5), torch.diag(torch.tensor([2.5, 3.5, 7.5], dtype=torch.float64)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    out_features=st.integers(1, 24),
    in_features=st.integers(1, 24),
    share=st.floats(0, 1),
    tokens=st.integers(1, 60),
    mode=st.sampled_from(["kpm", "ipm"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_rank(
    out_features: int, in_features: int, share: float, tokens: int, mode: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, in_features, generator=generator).to(dtype)
    X = torch.randn(tokens, in_features, generator=generator)
    X[:, 0] *= 60
    C = X.T @ X / tokens
    components = min(W.shape)
    rank = max(1, math.ceil(share * components))
    B, A, decomposition = factors(W, C, rank, mode)
    assert B.shape == (out_features, rank)
    assert A.shape == (rank, in_features)
    assert (decomposition.sigma.diff() <= 0).all()
    cut = components - rank if mode == "kpm" else rank
    if 0 < cut < components:  # between two equal singular values no cut is unique, in the paper's formula either
        sigma = torch.linalg.svdvals(W.double() @ damped(C, DAMPING))
        assume(float(sigma[cut - 1] - sigma[cut]) > 1e-6 * float(sigma[0]))
    assert relative(B @ A, paper_block(W, C, DAMPING, rank, mode)) <= BOUND
