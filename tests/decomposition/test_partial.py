"""The partial solver against full float64 decompositions: right wherever it answers, silent where it cannot know."""

from functools import cache

import pytest
import torch

import harness.decomposition.partial as partial
from harness.decomposition.context_svd import component_factors, context_svd, damped
from harness.decomposition.partial import BLOCK, leading_eigenvectors, partial_eigen
from harness.decomposition.plain_svd import balanced_factors, plain_svd
from tests.decomposition.reference import outlier_problem, paper_block

BOUND = 1e-5
DAMPING = 0.01
N = 512


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def with_spectrum(values: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors in the same order, float64."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    G = Q * values.double() @ Q.T
    return (G + G.T) / 2, Q


def projector_error(X: torch.Tensor, U: torch.Tensor) -> float:
    return float((X @ X.T - U @ U.T).norm())


POWER = torch.arange(1, N + 1).double() ** -1.5
OUTLIERS = torch.cat([torch.tensor([1e6, 9e5, 5e4]).double(), POWER[3:]])
STEP = torch.cat([torch.linspace(3, 2, 24), torch.linspace(0.5, 0.4, N - 24)]).double()
FLOOR = torch.cat([torch.linspace(3, 2, N - 24), torch.linspace(1e-2, 1e-3, 24)]).double()
HOLE = torch.cat([torch.linspace(3, 2, N - 24), torch.zeros(24)]).double()


@pytest.mark.parametrize(
    ("values", "k", "end"),
    [
        (POWER, 8, "largest"),
        (POWER, 16, "largest"),
        (OUTLIERS, 3, "largest"),
        (OUTLIERS, 16, "largest"),
        (STEP, 24, "largest"),
        (FLOOR, 24, "smallest"),
        (FLOOR, 8, "smallest"),
        (HOLE, 24, "smallest"),  # G is singular: its Cholesky decomposition fails or is rounding
    ],
)
def test_finds_the_eigenpairs(values: torch.Tensor, k: int, end: str) -> None:
    G, Q = with_spectrum(values)
    found = partial_eigen(G, k, end)
    assert found is not None
    columns = slice(0, k) if end == "largest" else slice(N - k, N)
    assert projector_error(found.vectors, Q[:, columns]) <= 1e-6
    assert projector_error(found.vectors, found.vectors) == 0
    assert (found.vectors.T @ found.vectors - torch.eye(k)).abs().max() <= 1e-12
    assert (found.values - values[columns]).abs().max() <= 1e-11 * values[0]
    assert found.largest == pytest.approx(float(values[0]), rel=0.02)
    assert found.beyond == pytest.approx(float(values[k] if end == "largest" else values[N - k - 1]), rel=0.1)
    again = partial_eigen(G, k, end)
    assert again is not None
    assert torch.equal(again.vectors, found.vectors)


@pytest.mark.parametrize("end", ["largest", "smallest"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_is_irrelevant(end: str, scale: float) -> None:
    G, Q = with_spectrum(STEP if end == "largest" else FLOOR)
    found = partial_eigen(scale * G, 24, end)
    assert found is not None
    assert projector_error(found.vectors, Q[:, :24] if end == "largest" else Q[:, -24:]) <= 1e-6


def equal(*groups: tuple[float, int]) -> torch.Tensor:
    """Eigenvalues with multiplicities, and a falling rest up to N."""
    values = torch.cat([torch.full((count,), value, dtype=torch.float64) for value, count in groups])
    return torch.cat([values, 0.1 * POWER[: N - len(values)]])


@pytest.mark.parametrize(
    ("values", "k"),
    [
        (equal((1.0, 24)), 16),  # the cut lies between equal ones
        (torch.ones(N).double(), 8),
        (equal((1.0, 16), (0.9, 1), (0.9 - 1e-13, 1)), 17),  # as good as equal
        (torch.rand(N, generator=torch.Generator().manual_seed(0)).double().sort(descending=True).values, 8),  # flat
        (POWER, N // 2),  # most of the space
        (torch.zeros(N).double(), 8),
    ],
    ids=["equal at the cut", "all equal", "nearly equal", "flat", "many", "zero"],
)
@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_knows_when_it_does_not(values: torch.Tensor, k: int, end: str) -> None:
    turned = values if end == "largest" else values.max() + 1 - values
    assert partial_eigen(with_spectrum(turned)[0], k, end) is None


@pytest.mark.parametrize("groups", [((1.0, 24),), ((1.0, BLOCK + 4), (0.9, 4)), ((1.0, 20), (0.9, 20), (0.8, 8))])
def test_equal_values_on_one_side_of_the_cut(groups: tuple[tuple[float, int], ...]) -> None:
    """More equal ones than the block has columns: what is missed at first must be found, or nothing be said."""
    values = equal(*groups)
    k = sum(count for _, count in groups)
    G, Q = with_spectrum(values)
    found = partial_eigen(G, k, "largest")
    assert found is None or projector_error(found.vectors, Q[:, :k]) <= 1e-6


@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_a_missed_eigenvector_is_noticed(end: str) -> None:
    """Eigenpairs with a perfect residual that are not the outermost ones."""
    values = POWER if end == "largest" else POWER.flip(0)
    G, Q = with_spectrum(values)
    for columns, outermost in ((list(range(8)), True), ([0, 1, 2, 3, 4, 6, 7, 8], False), (list(range(1, 9)), False)):
        last = columns[-1]
        middle = float(values[last] + values[last + 1]) / 2
        assert partial._is_outermost(G, Q[:, columns], values[columns], middle, end) is outermost


def test_an_orthogonal_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start block without any part in the first eigenvector never finds it; the answer is not the next ones."""
    G = torch.diag(POWER)
    real = torch.randn

    def blind(*size: int, **options: object) -> torch.Tensor:
        start = real(*size, **options)
        start[0] = 0
        return start

    assert partial_eigen(G, 8, "largest") is not None
    monkeypatch.setattr(torch, "randn", blind)
    assert partial_eigen(G, 8, "largest") is None


def test_gives_up_early_on_a_flat_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    grow = partial._Space.grow
    monkeypatch.setattr(partial._Space, "grow", lambda space: (steps.append(1), grow(space))[1])
    W = torch.randn(768, 2048, generator=torch.Generator().manual_seed(0)).double()
    assert partial_eigen(W @ W.T, 16, "largest") is None
    assert len(steps) * BLOCK <= 2 * 16 + 4 * BLOCK


def test_not_finite() -> None:
    G = torch.eye(N, dtype=torch.float64)
    G[3, 5] = G[5, 3] = float("nan")
    assert partial_eigen(G, 4, "largest") is None


# -- within the decompositions ----------------------------------------------------------------------------------------


@cache
def steep_problem(out_features: int, in_features: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs whose directions fall by a power law, and three channels ``factor`` times above the rest; fp32."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    mixing = torch.linalg.qr(torch.randn(in_features, in_features, generator=generator))[0]
    strength = torch.arange(1, in_features + 1).float() ** -0.8
    X = torch.randn(4 * in_features, in_features, generator=generator) * strength @ mixing
    X[:, :3] *= factor
    return W, X.T @ X / len(X)


SHAPES = [(256, 256), (704, 256), (256, 704)]
outliers = cache(outlier_problem)


def block(W: torch.Tensor, C: torch.Tensor, rank: int, mode: str) -> tuple[torch.Tensor, str]:
    cut = min(W.shape) - rank if mode == "kpm" else rank
    found = context_svd(W, damped(C, DAMPING), cut, "partial", "rest" if mode == "kpm" else "first")
    assert found.U.shape == (len(W), rank)
    assert found.sigma.shape == (rank,)
    assert (found.sigma.diff() <= 0).all()
    B, A = component_factors(W, found)
    assert B.float().isfinite().all()
    assert A.float().isfinite().all()
    full = context_svd(W, damped(C, DAMPING), cut, "svd")
    assert found.largest == pytest.approx(full.largest, rel=0.01)
    assert found.smallest is None or found.smallest == pytest.approx(full.smallest, rel=0.01, abs=1e-7 * full.largest)
    assert found.beyond_cut == pytest.approx(full.beyond_cut, rel=0.05, abs=1e-7 * full.largest)
    return B @ A, found.solver


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_context_svd_takes_what_it_finds(shape: tuple[int, int], factor: float) -> None:
    W, C = steep_problem(*shape, factor)
    for rank in (1, 8):
        found, solver = block(W, C, rank, "ipm")
        assert solver == "partial"
        assert relative(found, paper_block(W, C, DAMPING, rank, "ipm")) <= BOUND


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_context_svd_finds_the_smallest(factor: float) -> None:
    W, C = steep_problem(256, 256, factor)
    found, solver = block(W, C, 4, "kpm")
    assert solver == "partial"
    assert relative(found, paper_block(W, C, DAMPING, 4, "kpm")) <= BOUND


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [4000, 60], ids=["full covariance", "rank-deficient covariance"])
@pytest.mark.parametrize("factor", [1.0, 10.0, 60.0])
def test_context_svd_is_right_whatever_the_path(shape: tuple[int, int], tokens: int, factor: float, mode: str) -> None:
    W, C = outliers(*shape, tokens, factor=factor)
    for rank in (1, 16):
        found, _ = block(W, C, rank, mode)
        assert relative(found, paper_block(W, C, DAMPING, rank, mode)) <= BOUND


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_deficient_weight(shape: tuple[int, int]) -> None:
    W, C = outliers(*shape, 4000, factor=1.0)
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    sigma[-64:] = 0
    W = U @ torch.diag(sigma) @ Vh
    for rank in (8, 64):
        found, _ = block(W, C, rank, "kpm")
        assert found.norm() <= 1e-9 * W.norm()


@pytest.mark.parametrize(("needed", "rank"), [("first", 16), ("rest", 16)])
@pytest.mark.parametrize("shape", [(N, N), (700, N), (N, 700)], ids=str)
def test_plain_svd(shape: tuple[int, int], needed: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(size, N, generator=generator, dtype=torch.float64) for size in shape)
    U, V = (torch.linalg.qr(side)[0] for side in sides)
    sigma = torch.cat([torch.logspace(1, 0, 16), torch.linspace(0.5, 0.4, N - 32), torch.logspace(-1, -2, 16)]).double()
    W = U * sigma @ V.T
    cut = rank if needed == "first" else N - rank
    found, full = plain_svd(W, cut, "partial", needed), plain_svd(W, cut, "svd", needed)
    assert (found.solver, full.solver) == ("partial", "svd")
    assert found.side == full.side
    assert found.largest == pytest.approx(full.largest, rel=0.01)
    assert torch.allclose(found.sigma, full.sigma, rtol=1e-6)
    assert torch.allclose(found.vectors, full.vectors, atol=1e-6)
    blocks = [B @ A for B, A in (balanced_factors(W, decomposition) for decomposition in (found, full))]
    assert relative(blocks[0], blocks[1]) <= BOUND


def test_needed_side_is_that_part_of_all() -> None:
    W, _ = outliers(48, 80, 10)
    for solver in ("gram", "svd"):
        whole = plain_svd(W, 8, solver)
        for needed, columns in (("first", slice(0, 8)), ("rest", slice(8, None))):
            part = plain_svd(W, 8, solver, needed)
            assert torch.equal(part.vectors, whole.vectors[:, columns])
            assert torch.equal(part.sigma, whole.sigma[columns])
            assert part.largest == whole.largest == float(whole.sigma[0])


def test_auto_tries_it_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Krylov space for large matrices and small ranks; else, on the CPU, LAPACK's range solver up to a quarter."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(1024, 1024, generator=generator, dtype=torch.float64)
    falling = (torch.arange(1, 1025).double() ** -0.8)[:, None] * M
    assert plain_svd(falling, 16, "auto", "first").solver == "partial"
    assert plain_svd(falling, 16, "gram", "first").solver == "gram"
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    asked = [(4096, 128, cpu), (4096, 129, cpu), (4095, 16, cpu), (1024, 64, cuda), (1024, 65, cuda), (1023, 16, cuda)]
    assert [partial.expected_faster(n, k, "largest", device) for n, k, device in asked] == [True, False, False] * 2
    assert not any(partial.expected_faster(n, k, "smallest", device) for n, k, device in asked)
    assert plain_svd(falling[:256], 4, "auto").solver == "gram"
    monkeypatch.setattr(partial, "_ritz", lambda *_: pytest.fail("a Krylov space"))
    for needed, cut in (("first", 64), ("rest", 192)):
        assert plain_svd(falling[:256], cut, "auto", needed).solver == "partial"
    for needed, cut in (("first", 65), ("rest", 191)):
        assert plain_svd(falling[:256], cut, "auto", needed).solver == "gram"


@pytest.mark.parametrize("end", ["largest", "smallest"])
@pytest.mark.parametrize("counts", [(1,), (3, 7, 24), (0, 40)])
def test_the_range_solver_is_the_full_one(end: partial.End, counts: tuple[int, ...]) -> None:
    G, Q = with_spectrum(POWER)
    k = max(counts)
    found = partial.lapack_subset(G, counts, end)
    assert found is not None
    columns = slice(0, k) if end == "largest" else slice(len(G) - k, None)
    assert projector_error(found.vectors, Q[:, columns]) <= 1e-9
    assert torch.allclose(found.values, POWER[columns], rtol=1e-9)
    assert found.beyond == pytest.approx(float(POWER[k if end == "largest" else len(G) - k - 1]), rel=1e-9)
    assert found.largest == pytest.approx(float(POWER[0]), rel=1e-2)
    assert (G @ found.vectors - found.vectors * found.values).norm() < 1e-9 * G.norm()
    tied = torch.full_like(POWER, 1.0)
    assert partial.lapack_subset(with_spectrum(tied)[0], counts, end).gram_error > partial.GRAM_ERROR_LIMIT
    assert partial.lapack_subset(G * float("nan"), counts, end) is None


@pytest.mark.parametrize("solver", ["auto", "partial"])
def test_leading_eigenvectors_are_accurate_one_by_one(solver: str) -> None:
    G, Q = with_spectrum(POWER)
    found = leading_eigenvectors(G, 6, solver)
    assert ((found * Q[:, :6]).sum(0).abs() - 1).abs().max() <= 1e-10
    close = POWER.clone()
    close[3] = close[2] * (1 - 1e-12)  # as good as equal: no vectors of their own; the full solver's span is right
    G, Q = with_spectrum(close)
    assert projector_error(leading_eigenvectors(G, 6, solver), Q[:, :6]) <= 1e-8
