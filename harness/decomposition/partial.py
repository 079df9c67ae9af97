"""The k largest or k smallest eigenpairs of a symmetric positive semi-definite matrix, checked, or nothing.

For an initialisation that takes r components of a Gram matrix G = M Mᵀ, the eigendecomposition computes n − r vectors
too many. Here a block Krylov space is grown, span{X, HX, H²X, …} from a seeded random block X, with H = G for the
largest eigenvalues and H = G⁻¹ (from a Cholesky decomposition) for the smallest, orthogonalised in full; the
Rayleigh-Ritz method in that space gives the pairs. A power iteration of the same number of products knows only HʲX.

Nothing is taken on trust. With Ritz vectors X (n, k), Ritz values Λ and the gap δ between the k-th value and the next:

- ‖HX − XΘ‖_F / δ_H is below `RESIDUAL_LIMIT`: by the sin Θ theorem (Davis & Kahan, 1970) it bounds the turn of the
  subspace, if the rest of the spectrum lies where the Ritz values say. So is ‖GX − XΛ‖_F / δ, computed from G itself,
  as far as the rounding of that product, about √(n·k)·ε·λ₁, lets it be known (for the largest, H and G are the same).
- That it does, so that no eigenvalue was missed (of many equal ones a block finds only as many as it has columns), is
  proved by one more Cholesky decomposition: with the found pairs taken out, G lies wholly on the other side of the
  middle of the gap.
- ε·λ₁/δ, what rounding of G itself may have turned, is below `GRAM_ERROR_LIMIT` (see `context_svd`).

Where one of them fails, or the space would have to grow so far that the whole eigendecomposition is as fast, the answer
is None and the caller takes the full solver. The gap at the cut decides: a cut in the flat bulk of a spectrum, or
between equal eigenvalues, needs a space as large as the matrix. On the CPU that solver is LAPACK's for a range of
eigenvalues (`lapack_subset`) where it is enough.

Measured against the whole eigendecomposition on one core (n = 512 to 2048, k = 16 to 128,
`benchmarks/partial_solver.py`):
the largest of a spectrum that falls (inputs of a power law, outlier channels) in 1/6 to 1/2 of its time, and where the
spectrum is flat (a random weight, no covariance) giving up cost 5 to 25 % on top of it for k ≤ n/16. The smallest lie
in a flat bulk more often than not, and two Cholesky decompositions and an inverse are half of an eigendecomposition:
found, they took 0.6 to 1.9 of its time, and giving up cost 35 to 100 %. LAPACK's range solver takes half of it or less
whatever the spectrum, and is as fast as the Krylov space up to n = 2048; at 4096 (k = 64, one core) it took 4.7 s, the
Krylov space 2.3 to 4.3 s where it answered and 0.7 s where it did not. `expected_faster` is all that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from harness.decomposition.lapack import symmetric_subset

Solver = Literal["auto", "gram", "svd", "partial"]
Needed = Literal["all", "first", "rest"]  # of all components: those before the cut, those after it
GRAM_ERROR_LIMIT = 5e-5
RESIDUAL_LIMIT = 1e-6
BLOCK = 16  # columns: products with fewer are slower per column; with more the space must be larger
SUBSET_SHARE = 4  # LAPACK's range solver is taken for at most n / 4 eigenpairs
LARGEST_SHARE = 0.35  # of n: where the space is larger than this, the full eigendecomposition is as fast
End = Literal["largest", "smallest"]
_EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class PartialEigen:
    """``values`` (k,), descending, and ``vectors`` (n, k) of one end of a spectrum; all float64.

    ``beyond``: the Ritz value on the other side of the cut. ``largest``: λ₁, a Ritz value, which is never too large.
    ``gram_error``: the largest ε·λ₁/δ of all cuts.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    beyond: float
    largest: float
    gram_error: float


def needed_columns(needed: Needed, cuts: Sequence[int]) -> slice:
    """Which components are needed: before the last of ``cuts`` (first), after the first of them (rest), or all."""
    if needed == "all":
        return slice(None)
    return slice(0, max(cuts)) if needed == "first" else slice(min(cuts), None)


def needed_eigenpairs(G: torch.Tensor, cuts: Sequence[int], needed: Needed, solver: Solver) -> PartialEigen | None:
    """The eigenpairs of G (n, n) before the last of ``cuts`` (first) or after the first (rest), if ``solver`` allows.

    ``partial`` tries a Krylov space first, ``auto`` where that is expected to be faster; then, on the CPU, both take
    LAPACK's solver for a range of eigenvalues, whose ``gram_error`` the caller must judge. None: take the full solver.
    """
    if needed == "all" or solver not in ("auto", "partial"):
        return None
    end: End = "largest" if needed == "first" else "smallest"
    counts = cuts if needed == "first" else [len(G) - cut for cut in cuts]
    found = None
    if solver == "partial" or expected_faster(len(G), max(counts), end, G.device):
        found = partial_eigen(G, counts, end)
    if found is None and G.device.type == "cpu" and 0 < SUBSET_SHARE * max(counts) <= len(G):
        found = lapack_subset(G, counts, end)
    return found


def lapack_subset(
    G: torch.Tensor, counts: Sequence[int], end: End, largest: float | None = None
) -> PartialEigen | None:
    """What `partial_eigen` finds, by LAPACK's ``syevr`` for a range of eigenvalues; None where G is not finite.

    ``largest``: λ₁ where the caller knows it and asks for the other end.

    It reduces the whole of G (n, n, float64, on the CPU) to tridiagonal form, which is about half of the full
    decomposition's time, and spares the rest. A direct method: its ``gram_error`` may be above the limit, but no other
    decomposition of G would do better.
    """
    cuts = sorted({count for count in counts if count > 0})
    n, k = len(G), cuts[-1]
    wanted = [n - k - 1, n - 1] if end == "largest" else [0, k]  # one more: the gap at the cut
    if not bool(G.isfinite().all()):
        return None
    values, X = symmetric_subset(G, *wanted)
    if end == "largest":
        values, X = values.flip(0), X.flip(1)
        largest = float(values[0])
    elif largest is None:
        largest = largest_eigenvalue(G)
    gaps = [abs(float(values[cut - 1] - values[cut])) for cut in cuts]
    gram_error = _EPSILON * largest / min(gaps) if min(gaps) > 0 else math.inf
    beyond, values, X = float(values[k]), values[:k], X[:, :k]
    if end == "smallest":
        values, X = values.flip(0), X.flip(1)
    return PartialEigen(values.contiguous(), X.contiguous(), beyond, largest, gram_error)


def leading_eigenvectors(C: torch.Tensor, k: int, solver: Solver) -> torch.Tensor:
    """The eigenvectors of the ``k`` largest eigenvalues of C (n, n), symmetric and positive semi-definite; (n, k).

    Each is accurate by itself, not only their span: with a partial solver every gap between them is a cut.
    """
    found = needed_eigenpairs(C, range(1, k + 1), "first", solver)
    if found is None or found.gram_error > GRAM_ERROR_LIMIT:
        return torch.linalg.eigh(C)[1].flip(-1)[:, :k]
    return found.vectors


def estimated_gram_error(squares: torch.Tensor, cut: int) -> float:
    """Estimated turn of the subspaces on both sides of ``cut``, from the squared singular values (descending)."""
    if cut <= 0 or cut >= len(squares):
        return 0.0
    gap = float(squares[cut - 1] - squares[cut])
    noise = torch.finfo(squares.dtype).eps * float(squares[0])
    return noise / gap if gap > 0 else float("inf")


def expected_faster(n: int, k: int, end: End, device: torch.device) -> bool:
    """Whether `partial_eigen` is worth trying for k eigenpairs of an (n, n) matrix of unknown spectrum; measured.

    On the CPU the alternative is LAPACK's range solver, elsewhere the whole eigendecomposition.
    """
    if end == "smallest":
        return False
    return n >= 4096 and 32 * k <= n if device.type == "cpu" else n >= 1024 and 16 * k <= n


def partial_eigen(G: torch.Tensor, counts: int | Sequence[int], end: End) -> PartialEigen | None:
    """The k = max(``counts``) eigenpairs at one ``end`` of the spectrum, or None where they are better had in full.

    Args:
        G: symmetric positive semi-definite, (n, n), float64.
        counts: the caller separates the first c eigenpairs, counted from that end, from the rest, for each c given;
            accuracy is judged there.
        end: which eigenvalues.
    """
    cuts = sorted({counts} if isinstance(counts, int) else {c for c in counts if c > 0})
    n = len(G)
    if not cuts or cuts[-1] <= 0 or cuts[-1] + BLOCK > LARGEST_SHARE * n or not bool(G.isfinite().all()):
        return None
    if float(G.diagonal().mean()) <= 0:
        return None
    if end == "largest":
        found = _ritz(G, cuts, None)
        return None if found is None else _accepted(G, *found, cuts, end, None)
    largest = largest_eigenvalue(G)
    inverse = _inverse(G, largest)
    found = None if inverse is None else _ritz(inverse, cuts, largest)
    if found is None:
        return None
    values, X = found
    # What X has of the largest eigenvectors counts most in a residual of G and least in one of its inverse: one step of
    # inverse iteration takes it out.
    return _accepted(G, values, torch.linalg.qr(inverse @ X)[0], cuts, end, largest)


def _inverse(G: torch.Tensor, largest: float) -> torch.Tensor | None:
    """G⁻¹ (n, n), of G shifted by rounding size where it has no Cholesky decomposition."""
    for shift in (0.0, len(G) * _EPSILON * largest):
        shifted = G if shift == 0 else G + shift * torch.eye(len(G), dtype=G.dtype, device=G.device)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(factor)
            return inverse if bool(inverse.isfinite().all()) else None
    return None


def largest_eigenvalue(G: torch.Tensor) -> float:
    """λ₁ by 16 Lanczos steps: a part of a percent too small in a flat spectrum, exact in a steep one."""
    steps = min(16, len(G))
    v = torch.randn(len(G), generator=torch.Generator().manual_seed(0), dtype=G.dtype).to(G.device)
    basis = G.new_zeros(steps, len(G))
    projected = G.new_zeros(steps, steps)
    for step in range(steps):
        norm = float(v.norm())
        if norm == 0:  # the space is whole
            break
        basis[step] = v / norm
        product = torch.mv(G, basis[step])
        projected[: step + 1, step] = projected[step, : step + 1] = basis[: step + 1] @ product
        v = product - basis[: step + 1].T @ (basis[: step + 1] @ product)
    return float(torch.linalg.eigvalsh(projected)[-1])


class _Space:
    """An orthonormal basis (n, m) of a block Krylov space of H, and H projected on it."""

    def __init__(self, H: torch.Tensor, block: int, largest_size: int) -> None:
        n = len(H)
        self._H, self._block, self.size = H, block, 0
        self._basis = H.new_empty(n, largest_size + block)
        self._projected = H.new_zeros(largest_size, largest_size)
        # Drawn on the CPU, so that the start is the same on every device.
        start = torch.randn(n, block, generator=torch.Generator().manual_seed(0), dtype=H.dtype).to(H.device)
        self._basis[:, :block] = torch.linalg.qr(start)[0]
        self._coupling = H.new_zeros(block, block)

    def grow(self) -> None:
        """One block more."""
        first, last = self.size, self.size + self._block
        basis = self._basis[:, :last]
        product = self._H @ basis[:, first:]
        coefficients = basis.T @ product
        self._projected[:last, first:last] = coefficients
        self._projected[first:last, :last] = coefficients.T
        # Orthogonalised again after the normalisation: of a product that lay all but in the space, what is left is
        # rounding, whose direction is anyone's.
        block, R = torch.linalg.qr(product - basis @ coefficients)
        block, R_again = torch.linalg.qr(block - basis @ (basis.T @ block))
        self._basis[:, last : last + self._block], self._coupling = block, R_again @ R
        self.size = last

    def projected(self) -> torch.Tensor:
        """H projected on the space, (m, m)."""
        projected = self._projected[: self.size, : self.size]
        return (projected + projected.T) / 2

    def residuals(self, vectors: torch.Tensor) -> torch.Tensor:
        """‖H x − x θ‖ of Ritz pairs, (k,), from their ``vectors`` (m, k) in the basis, without a product."""
        return (self._coupling @ vectors[self.size - self._block :]).norm(dim=0)

    def lifted(self, vectors: torch.Tensor) -> torch.Tensor:
        """Ritz vectors, (n, k), from their ``vectors`` (m, k) in the basis."""
        return self._basis[:, : self.size] @ vectors


def _ritz(H: torch.Tensor, cuts: list[int], largest: float | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ritz values (k + 1, descending) and vectors (n, k) of H for which the residuals are small at every cut, or None.

    ``largest``: λ₁ of G where H is its inverse.
    """
    k, n = cuts[-1], len(H)
    most = int(LARGEST_SHARE * n) // BLOCK * BLOCK
    space, history = _Space(H, BLOCK, most), []
    check = k + 2 * BLOCK
    while space.size < most:
        space.grow()
        if space.size < min(check, most):
            continue
        values, vectors = torch.linalg.eigh(space.projected())
        values, vectors = values.flip(-1)[: k + 1], vectors.flip(-1)[:, :k]
        if _hopeless(values, cuts, largest):
            return None
        error = _turn(space.residuals(vectors), values, cuts)
        if error <= RESIDUAL_LIMIT / 2:
            return values, space.lifted(vectors)
        history.append((space.size, error))
        # The error stands still while the space takes shape; where that takes long, the spectrum is flat at the cut.
        if len(history) == 1:
            check = 2 * k + 4 * BLOCK
            continue
        expected = _expected_size(history)
        if expected > most:
            return None
        # Not before most of what seems to be missing is there: each look is an eigendecomposition of its own.
        check = max(space.size + BLOCK, int(space.size + 3 * expected) // 4)
    return None


def _hopeless(values: torch.Tensor, cuts: list[int], largest: float | None) -> bool:
    """Whether rounding of G alone turns some cut by far too much, from Ritz values so far: their gaps only shrink."""
    values = values if largest is None else 1 / values.clamp_min(torch.finfo(values.dtype).tiny)
    top = float(values[0]) if largest is None else largest
    gaps = [abs(float(values[c - 1] - values[c])) for c in cuts]
    return min(gaps) * 10 * GRAM_ERROR_LIMIT < _EPSILON * top


def _turn(residuals: torch.Tensor, values: torch.Tensor, cuts: list[int]) -> float:
    """The largest ‖residual‖_F / gap of all cuts; ``values``: one more than there are residuals."""
    errors = []
    for c in cuts:
        gap = abs(float(values[c - 1] - values[c]))
        errors.append(float(residuals[:c].norm()) / gap if gap > 0 else float("inf"))
    return max(errors)


def _expected_size(history: list[tuple[int, float]]) -> float:
    """The size of the space at which the error will be small enough, if it goes on falling as it did; maybe infinite.

    It falls by the same factor with every block, or by a growing one.
    """
    (earlier_size, earlier), (size, error) = history[-2:]
    if error >= earlier:
        return math.inf
    return size + (size - earlier_size) * math.log(error / RESIDUAL_LIMIT) / math.log(earlier / error)


def _accepted(
    G: torch.Tensor,
    ritz: torch.Tensor,
    X: torch.Tensor,
    cuts: list[int],
    end: End,
    largest: float | None,
) -> PartialEigen | None:
    """What was found, if G itself confirms it."""
    product = G @ X
    projected = X.T @ product
    values, turn = torch.linalg.eigh((projected + projected.T) / 2)
    if end == "largest":
        values, turn = values.flip(0), turn.flip(1)
    X, product = X @ turn, product @ turn
    beyond = ritz[-1:] if end == "largest" else 1 / ritz[-1:]
    both = torch.cat([values, beyond])
    residual_error = _turn((product - X * values).norm(dim=0), both, cuts)
    top = float(values[0]) if largest is None else largest
    gram_error = max(_EPSILON * top / max(abs(float(both[c - 1] - both[c])), 1e-300) for c in cuts)
    rounding = math.sqrt(X.numel()) * gram_error
    if not (residual_error <= RESIDUAL_LIMIT + rounding and gram_error <= GRAM_ERROR_LIMIT):
        return None
    middle = float(values[-1] + beyond[0]) / 2
    if not _is_outermost(G, X, values, middle, end):
        return None
    if end == "smallest":
        values, X = values.flip(0), X.flip(1)
    return PartialEigen(values, X, float(beyond[0]), top, gram_error)


def _is_outermost(G: torch.Tensor, X: torch.Tensor, values: torch.Tensor, middle: float, end: End) -> bool:
    """Whether all eigenvalues of G but ``values`` are below (largest) or above (smallest) ``middle``.

    Their eigenvectors ``X`` (n, k) are moved to the other side; what comes out must have a Cholesky decomposition.
    """
    sign = -1.0 if end == "largest" else 1.0
    # The found values become 0 (largest) or 2·middle (smallest).
    moved = values if end == "largest" else 2 * middle - values
    definite = sign * G + (X * moved) @ X.T
    definite.diagonal().sub_(sign * middle)
    return int(torch.linalg.cholesky_ex(definite).info) == 0
