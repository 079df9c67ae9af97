"""Importance, inverse rank allocation and scored directions against the paper's formulas in float64."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.decomposition.fisher import (
    EPSILON,
    direction_factors,
    importance,
    inverse_ranks,
    scored_directions,
)
from tests.decomposition.fisher_reference import (
    fisher_problem,
    paper_choice,
    paper_importance,
    paper_ranks,
    paper_scores,
)

SHAPES = [(96, 96), (160, 64), (64, 160)]
problem = cache(fisher_problem)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [4000, 20], ids=["full covariances", "rank-deficient covariances"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_importance_and_scores(shape: tuple[int, int], tokens: int) -> None:
    W, H, D = problem(*shape, tokens)
    assert importance(W, H, D) == pytest.approx(paper_importance(W, H, D), rel=1e-12)
    directions = scored_directions(W, H, D)
    expected = torch.tensor(paper_scores(W, H, D), dtype=torch.float64)
    assert torch.allclose(directions.scores, expected[directions.index], rtol=1e-9, atol=0)
    assert (directions.scores.diff() <= 0).all()
    assert sorted(directions.index.tolist()) == list(range(min(shape)))
    assert directions.index.tolist() != sorted(directions.index.tolist())  # not just the order of singular values
    # What the scores are of: a small relative change along every direction is one along W (Eq. 7 and 14).
    along = sum(
        float((D.double() @ part @ H.double() * part).sum())
        for part in (directions.sigma[i] * torch.outer(directions.U[:, i], directions.Vh[i]) for i in range(min(shape)))
    )
    assert float(directions.scores.sum()) == pytest.approx(along, rel=1e-9)


@pytest.mark.parametrize("low", [True, False], ids=["low", "high"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chosen_directions(shape: tuple[int, int], low: bool) -> None:
    W, H, D = problem(*shape)
    directions = scored_directions(W, H, D)
    count = min(shape)
    for rank in (1, 13, count):
        chosen = slice(count - rank, count) if low else slice(0, rank)
        numbers, block = paper_choice(W, H, D, rank, low)
        assert directions.index[chosen].tolist() == numbers
        B, A = direction_factors(directions, chosen)
        assert B.shape == (shape[0], rank)
        assert A.shape == (rank, shape[1])
        assert relative(B @ A, block) <= 1e-9
        assert relative(B.T @ B, torch.diag(directions.sigma[chosen])) <= 1e-9  # √Σ on either side
        assert relative(A @ A.T, torch.diag(directions.sigma[chosen])) <= 1e-9
    assert relative(block, W.double()) <= 1e-12  # of full rank: the whole weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_deficient_weight(shape: tuple[int, int]) -> None:
    """The low directions of a deficient weight are nothing, but both factors cannot be zero: they would never learn."""
    W, H, D = problem(*shape)
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    sigma[-16:] = 0
    W = U @ torch.diag(sigma) @ Vh
    directions = scored_directions(W, H, D)
    count = min(shape)
    B, A = direction_factors(directions, slice(count - 16, count))
    assert float((B @ A).norm()) <= 1e-12 * float(W.norm())
    assert bool((B.float().norm(dim=0) > 0).all())
    B, A = direction_factors(directions, slice(0, count))
    assert relative(B @ A, W) <= 1e-12


def test_zeros() -> None:
    W, H, D = problem(64, 64)
    B, A = direction_factors(scored_directions(0 * W, H, D), slice(0, 8))
    assert B.isfinite().all() and A.isfinite().all()
    assert not (B @ A).any()
    # Without any score the order is that of singular values.
    for nothing in ((0 * H, D), (H, 0 * D)):
        assert scored_directions(W, *nothing).index.tolist() == list(range(64))
        assert importance(W, *nothing) == 0.0


IMPORTANCES = [3e-9, 1e-8, 4e-10, 7e-7, 2e-8, 6e-9]


@pytest.mark.parametrize(
    ("importances", "bounds", "ranks"),
    [
        (IMPORTANCES, (1, 50, 64), [32, 10, 64, 1, 5, 16]),
        (IMPORTANCES, (4, 8, 20), [5, 4, 20, 4, 4, 4]),
        (IMPORTANCES, (5, 5, 5), [5] * 6),
        ([2.0, 2.0, 2.0], (1, 7, 64), [7, 7, 7]),
        ([1.0, 0.25], (1, 5, 64), [2, 8]),
        ([0.0, 0.0], (1, 7, 64), [7, 7]),
        ([1e-9, 0.0, 1e-9], (1, 7, 64), [1, 21, 1]),
        ([5.0], (1, 7, 64), [7]),
        ([], (1, 7, 64), []),
    ],
)
def test_inverse_ranks(importances: list[float], bounds: tuple[int, int, int], ranks: list[int]) -> None:
    assert inverse_ranks(importances, *bounds) == ranks
    if sum(importances) > 0:
        assert paper_ranks(importances, EPSILON * sum(importances), *bounds) == ranks


def test_the_budget_is_not_kept_by_clipping() -> None:
    """Eq. 12 clips after Eq. 11 has shared the budget out, and nothing puts back what was cut off, on either side."""
    assert sum(inverse_ranks([1e-9, 1.0, 1.0, 1.0], 1, 50, 64)) == 64 + 3 < 50 * 4
    assert sum(inverse_ranks([1e-9, 1.0, 1.0, 1.0], 8, 10, 40)) == 40 + 24 > 10 * 4


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    importances=st.lists(st.floats(1e-12, 1e-2), min_size=1, max_size=12),
    scale=st.sampled_from([2.0**-30, 1.0, 2.0**30]),
    bounds=st.tuples(st.integers(1, 8), st.integers(0, 24), st.integers(0, 40)),
    shuffle=st.randoms(use_true_random=False),
)
def test_ranks_do_not_depend_on_scale_or_order(
    importances: list[float], scale: float, bounds: tuple[int, int, int], shuffle: object
) -> None:
    """The loss may be in any unit (a power of two here, so that nothing is rounded), layers in any order."""
    r_min, r_avg, r_max = bounds[0], bounds[0] + bounds[1], bounds[0] + bounds[1] + bounds[2]
    ranks = inverse_ranks(importances, r_min, r_avg, r_max)
    assert all(r_min <= rank <= r_max for rank in ranks)
    assert inverse_ranks([scale * value for value in importances], r_min, r_avg, r_max) == ranks
    order = list(range(len(importances)))
    shuffle.shuffle(order)
    assert inverse_ranks([importances[i] for i in order], r_min, r_avg, r_max) == [ranks[i] for i in order]
    by_importance = [rank for _, rank in sorted(zip(importances, ranks, strict=True))]
    assert by_importance == sorted(by_importance, reverse=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    out_features=st.integers(1, 20),
    in_features=st.integers(1, 20),
    rank=st.integers(1, 20),
    low=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_rank(
    out_features: int, in_features: int, rank: int, low: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, in_features, generator=generator).to(dtype)
    H, D = (
        factor @ factor.T for factor in (torch.randn(n, n, generator=generator) for n in (in_features, out_features))
    )
    count = min(W.shape)
    rank = min(rank, count)
    directions = scored_directions(W, H, D)
    chosen = slice(count - rank, count) if low else slice(0, rank)
    B, A = direction_factors(directions, chosen)
    numbers, block = paper_choice(W, H, D, rank, low)
    assert directions.index[chosen].tolist() == numbers
    assert relative(B @ A, block) <= 1e-9
