"""Context-oriented SVD (CO-SVD) without an inverse.

CorDA++ (§III-B, Eq. 2–3, 11, 13) takes SVD(W·C̃) = U Σ Vᵀ with the damped input covariance C̃ and builds the adapter
from r components as B = U_r Σ_r^½, A = Σ_r^½ (Vᵀ C̃⁻¹)_r. Since Uᵀ (W C̃) = Σ Vᵀ, the second factor is
A = Σ_r^{-½} U_rᵀ W: neither C̃⁻¹ nor V appears, and B·A = U_r U_rᵀ W is the projection of W on the chosen left
singular vectors.

U and Σ come from a float64 eigendecomposition of the Gram matrix M Mᵀ = U Σ² Uᵀ. For a tall weight (out > in), U spans
W's column space: with the thin factorisation W = Q R the problem is that of R·C̃, in × in, and U = Q·U_R, so the
smaller side is always the one decomposed and nothing is divided by a small singular value. R comes from the Cholesky
decomposition of WᵀW, U_R is carried over by a triangular solve, and Householder's QR takes over where the condition of
W left the columns of U less than orthonormal. Where the components on
one side of the cut are enough, the partial solver may find them alone (`harness.decomposition.partial`).

Warning:
    The Gram matrix squares the singular values: its eigenvalues carry an absolute error of about ε·σ₁², and the
    subspace on one side of a cut between components k and k+1 turns by about ε·σ₁² / (σ_k² − σ_{k+1}²). That estimate
    decides, at the cut that the caller needs: above `GRAM_ERROR_LIMIT` the float64 SVD of M takes over. (A limit on
    cond(M) alone errs both ways: with outlier channels 600× the rest an error of 1e-4 was seen at a condition of
    1e6, and one of 1e-7 at 7e6.) Measured errors of B·A were 0.001 to 0.1 of the estimate.
    Singular vectors of equal singular values are only defined up to a rotation; B·A for a cut between two equal
    values is then not unique, in the paper's formula as in this one.

Singular values alone (`singular_values`) have no cut. There the smallest suffers most: its relative error is at most
about ε·(σ₁/σ_R)², which is compared with `GRAM_VALUE_LIMIT`. Over 64 random problems (sides 256 to 704, outlier
channels up to 300 times the rest, damping 1e-4 to 1e-2) the true error was below 0.12 of that estimate wherever the
estimate was below 1, so the limit keeps it near 1e-5: far below the steps between neighbouring scores of rank
allocation. A sum over all σ/σ₁ does not need the fallback: what the Gram matrix loses is below √ε of σ₁ per value, and
was below 4e-7 of the sum in the same problems.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from harness.decomposition.deflation import smallest_deflated
from harness.decomposition.gram import gram_matrix
from harness.decomposition.partial import (
    GRAM_ERROR_LIMIT,
    Needed,
    PartialEigen,
    Solver,
    estimated_gram_error,
    needed_columns,
    needed_eigenpairs,
)

GRAM_VALUE_LIMIT = 1e-4
ORTHONORMAL_LIMIT = 1e-9  # of a Cholesky QR, above which Householder's takes over
COLUMNS = 512  # of a covariance that are held in float64 at a time
ROWS = 256  # of a triangular factor that are multiplied at a time
REFERENCE_DAMPING, REFERENCE_LIMIT, REFERENCE_DOUBLINGS = 0.01, 0.05, 60


@dataclass(frozen=True)
class ContextSVD:
    """The components of W·C̃ that were asked for: all R = min(out, in), those before the cut or those after it.

    ``U``: left singular vectors as columns, (out, k), float64. ``sigma``: singular values, (k,), descending.
    ``solver`` is the path taken; ``gram_error`` is the estimate that decided it (0 without a cut).

    ``largest``, ``smallest``: of all R singular values; ``beyond_cut``: number cut + 1 of them (the last where there is
    none). The partial solver knows no ``smallest`` before the cut; its ``largest`` after the cut comes from a small
    Krylov space and its ``beyond_cut`` before it is a Ritz value: both are for reports.
    """

    U: torch.Tensor
    sigma: torch.Tensor
    solver: Literal["gram", "svd", "partial"]
    gram_error: float
    largest: float
    smallest: float | None
    beyond_cut: float


def damped(covariance: torch.Tensor, damping: float) -> torch.Tensor:
    """C̃ = C + ``damping`` · mean(diag C) · I in float64, shape (in, in) (CorDA++, end of §III-B)."""
    C = covariance.to(torch.float64, copy=True)
    C.diagonal().add_(damping * C.diagonal().mean())
    return C


def reference_damping(covariance: torch.Tensor) -> float:
    """The damping that the reference implementation would use: 0.01, doubled until the fp32 inverse looks right.

    CorDA++ (end of §III-B) leaves the numbers open. The reference code starts at 0.01 of the mean diagonal and accepts
    the first fp32 inverse with ‖C̃ C̃⁻¹ − I‖ (Frobenius) below 0.05, whatever the layer's width.

    Raises:
        ValueError: ``covariance`` (in, in) is all zero or not finite, so that no damping helps.
    """
    C = covariance.float()
    identity = torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
    damping = REFERENCE_DAMPING
    for _ in range(REFERENCE_DOUBLINGS):
        C_damped = C + damping * C.diagonal().mean() * identity
        inverse = torch.linalg.inv_ex(C_damped).inverse  # NaN or inf of a singular matrix passes no limit
        if float((C_damped @ inverse - identity).norm()) < REFERENCE_LIMIT:
            return damping
        damping *= 2
    raise ValueError("covariance: all zero or not finite; no damping makes it invertible")


def context_svd(
    W: torch.Tensor,
    C_damped: torch.Tensor,
    cut: int,
    solver: Solver = "auto",
    needed: Needed = "all",
    shift: float = 0.0,
) -> ContextSVD:
    """U and Σ of W·C̃ (CorDA++, Eq. 2).

    Args:
        W: weight, (out, in), any floating dtype.
        C_damped: damped input covariance, (in, in); or the bare one, with C̃ = C + ``shift``·I.
        cut: the caller separates the first ``cut`` components from the rest; accuracy is judged there.
        solver: ``auto`` takes the partial solver where it is expected to be faster, else the Gram matrix, and falls
            back to the SVD where the Gram matrix is not accurate enough. ``partial`` tries the partial solver first.
        needed: the components to return, ``first``: before the cut, ``rest``: after it. Only then a partial solver
            can be of use.
    """
    if W.shape[0] <= W.shape[1]:
        return _solve(_times(W.double(), C_damped, shift), cut, solver, needed)
    # W in float64 is made anew where it is needed: held meanwhile, it would be the largest thing in memory.
    if solver != "svd" and (R := _cholesky_factor(W.double())) is not None:
        found = _solve(_triangular_times(R, C_damped, shift), cut, solver, needed)
        U = W.double() @ torch.linalg.solve_triangular(R, found.U, upper=True)
        if _orthonormal(U):
            return replace(found, U=U)
    Q, R = torch.linalg.qr(W.double())
    found = _solve(_triangular_times(R, C_damped, shift), cut, solver, needed)
    return replace(found, U=Q @ found.U)


def singular_values(W: torch.Tensor, C_damped: torch.Tensor, solver: Solver = "auto") -> torch.Tensor:
    """Σ of W·C̃ without vectors, (min(out, in),), float64, descending.

    Args:
        W: weight, (out, in), any floating dtype.
        C_damped: damped input covariance, (in, in).
        solver: ``auto`` takes the Gram matrix of the smaller side and falls back to the SVD where the smallest value
            would be wrong; ``gram`` never falls back, which is enough for sums over the spectrum. ``partial`` is
            ``auto`` here, where all values are wanted.
    """
    W64 = W.double()
    if W.shape[0] > W.shape[1]:
        M = _triangular_times(torch.linalg.qr(W64, mode="r")[1], C_damped, 0.0)
    else:
        M = _times(W64, C_damped, 0.0)
    if solver != "svd":
        squares = torch.linalg.eigvalsh(gram_matrix(M)).flip(-1)
        noise = torch.finfo(squares.dtype).eps * float(squares[0])
        if solver == "gram" or noise <= GRAM_VALUE_LIMIT * float(squares[-1]):
            return squares.clamp_min(0).sqrt()
    return torch.linalg.svdvals(M)


def _times(R: torch.Tensor, C: torch.Tensor, shift: float) -> torch.Tensor:
    """R·(C + shift·I) in float64; ``C`` of another dtype is converted some columns at a time, never as a whole."""
    product = torch.empty_like(R)
    for first in range(0, C.shape[1], COLUMNS):
        torch.mm(R, C[:, first : first + COLUMNS].double(), out=product[:, first : first + COLUMNS])
    return product if shift == 0 else product.add_(R, alpha=shift)


def _triangular_times(R: torch.Tensor, C: torch.Tensor, shift: float) -> torch.Tensor:
    """`_times` for an upper triangular R (n, n), whose zeros are left out."""
    product = torch.empty_like(R)
    for first in range(0, C.shape[1], COLUMNS):
        columns = C[:, first : first + COLUMNS].double()
        for row in range(0, len(R), ROWS):
            rows = slice(row, row + ROWS)
            torch.mm(R[rows, row:], columns[row:], out=product[rows, first : first + COLUMNS])
    return product if shift == 0 else product.add_(R, alpha=shift)


def _cholesky_factor(W64: torch.Tensor) -> torch.Tensor | None:
    """R of W = Q·R from WᵀW = RᵀR: a fraction of Householder's cost; None where W is singular to rounding."""
    R, info = torch.linalg.cholesky_ex(gram_matrix(W64.T), upper=True)
    return R if int(info) == 0 else None


def _orthonormal(U: torch.Tensor) -> bool:
    """Whether W·R⁻¹ kept the columns orthonormal: its error grows with the square of W's condition."""
    error = gram_matrix(U.T)
    error.diagonal().sub_(1.0)
    return float(error.abs().max()) <= ORTHONORMAL_LIMIT


def _solve(M: torch.Tensor, cut: int, solver: Solver, needed: Needed) -> ContextSVD:
    gram_error = 0.0
    if solver != "svd":
        found = _deflated(M, cut, solver, needed)
        if found is None:
            G = gram_matrix(M)
            found = needed_eigenpairs(G, [cut], needed, solver)
        if found is not None:
            gram_error = found.gram_error
            if gram_error <= GRAM_ERROR_LIMIT:
                return _from_partial(found, needed)
        else:
            squares, vectors = torch.linalg.eigh(G)
            squares, U = squares.flip(-1), vectors.flip(-1)
            gram_error = estimated_gram_error(squares, cut)
            if solver == "gram" or gram_error <= GRAM_ERROR_LIMIT:
                return _from_full(U, squares.clamp_min(0).sqrt(), cut, needed, "gram", gram_error)
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    return _from_full(U, sigma, cut, needed, "svd", gram_error)


def _deflated(M: torch.Tensor, cut: int, solver: Solver, needed: Needed) -> PartialEigen | None:
    """The smallest eigenpairs of M Mᵀ where outliers would spoil it as a whole."""
    wanted = len(M) - cut
    if solver not in ("auto", "partial") or needed != "rest" or wanted == 0 or M.device.type != "cpu":
        return None
    return smallest_deflated(M, [wanted])


def _from_partial(found: PartialEigen, needed: Needed) -> ContextSVD:
    sigma = found.values.clamp_min(0).sqrt()
    smallest, beyond_cut = (None, found.beyond) if needed == "first" else (float(sigma[-1]), float(found.values[0]))
    return ContextSVD(
        found.vectors,
        sigma,
        "partial",
        found.gram_error,
        max(found.largest, 0.0) ** 0.5,
        smallest,
        max(beyond_cut, 0.0) ** 0.5,
    )


def _from_full(
    U: torch.Tensor, sigma: torch.Tensor, cut: int, needed: Needed, solver: Literal["gram", "svd"], gram_error: float
) -> ContextSVD:
    columns = needed_columns(needed, [cut])
    largest, smallest, beyond_cut = (float(sigma[i]) for i in (0, -1, min(cut, len(sigma) - 1)))
    return ContextSVD(U[:, columns], sigma[columns], solver, gram_error, largest, smallest, beyond_cut)


def component_factors(
    W: torch.Tensor, decomposition: ContextSVD, columns: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """B = U_r Σ_r^½ (out, r) and A = Σ_r^{-½} U_rᵀ W (r, in) of the chosen components, float64 (Eq. 11 and 13).

    ``columns``: of those that ``decomposition`` holds.

    B·A = U_r U_rᵀ W holds whatever is put between the factors; a singular value of zero would put 0·∞ there, so the
    split (not the product) uses σ no smaller than machine epsilon times the largest.
    """
    U, sigma = decomposition.U[:, columns], decomposition.sigma[columns]
    floor = torch.finfo(torch.float64).eps * max(decomposition.largest, torch.finfo(torch.float64).tiny)
    root = sigma.clamp_min(floor).sqrt()
    return U * root, (U.T @ W.double()) / root[:, None]
