"""Context-oriented SVD (CO-SVD) without an inverse.

CorDA++ (§III-B, Eq. 2–3, 11, 13) takes SVD(W·C̃) = U Σ Vᵀ with the damped input covariance C̃ and builds the adapter
from r components as B = U_r Σ_r^½, A = Σ_r^½ (Vᵀ C̃⁻¹)_r. Since Uᵀ (W C̃) = Σ Vᵀ, the second factor is
A = Σ_r^{-½} U_rᵀ W: neither C̃⁻¹ nor V appears, and B·A = U_r U_rᵀ W is the projection of W on the chosen left
singular vectors.

U and Σ come from a float64 eigendecomposition of the Gram matrix M Mᵀ = U Σ² Uᵀ. For a tall weight (out > in), U spans
W's column space: with the thin factorisation W = Q R the problem is that of R·C̃, in × in, and U = Q·U_R, so the
smaller side is always the one decomposed and nothing is divided by a small singular value.

Warning:
    The Gram matrix squares the singular values: its eigenvalues carry an absolute error of about ε·σ₁², and the
    subspace on one side of a cut between components k and k+1 turns by about ε·σ₁² / (σ_k² − σ_{k+1}²). That estimate
    decides, at the cut that the caller needs: above `GRAM_ERROR_LIMIT` the float64 SVD of M takes over. (A limit on
    cond(M) alone errs both ways: with outlier channels 600× the rest an error of 1e-4 was seen at a condition of
    1e6, and one of 1e-7 at 7e6.) Measured errors of B·A were 0.001 to 0.1 of the estimate.
    Singular vectors of equal singular values are only defined up to a rotation; B·A for a cut between two equal
    values is then not unique, in the paper's formula as in this one.
"""

from dataclasses import dataclass
from typing import Literal

import torch

GRAM_ERROR_LIMIT = 5e-5


@dataclass(frozen=True)
class ContextSVD:
    """``U``: left singular vectors of W·C̃ as columns, (out, R), float64. ``sigma``: singular values, (R,), descending.

    R = min(out, in). ``solver`` is the path taken; ``gram_error`` is the estimate that decided it (0 without a cut).
    """

    U: torch.Tensor
    sigma: torch.Tensor
    solver: Literal["gram", "svd"]
    gram_error: float


def damped(covariance: torch.Tensor, damping: float) -> torch.Tensor:
    """C̃ = C + ``damping`` · mean(diag C) · I in float64, shape (in, in) (CorDA++, end of §III-B)."""
    C = covariance.double()
    return C + damping * C.diagonal().mean() * torch.eye(C.shape[0], dtype=C.dtype, device=C.device)


def context_svd(
    W: torch.Tensor, C_damped: torch.Tensor, cut: int, solver: Literal["auto", "gram", "svd"] = "auto"
) -> ContextSVD:
    """U and Σ of W·C̃ (CorDA++, Eq. 2).

    Args:
        W: weight, (out, in), any floating dtype.
        C_damped: damped input covariance, (in, in).
        cut: the caller separates the first ``cut`` components from the rest; accuracy is judged there.
        solver: ``auto`` takes the Gram matrix and falls back to the SVD where the Gram matrix is not accurate enough.
    """
    W64, C64 = W.double(), C_damped.double()
    tall = W.shape[0] > W.shape[1]
    Q, R = torch.linalg.qr(W64) if tall else (None, W64)
    M = R @ C64
    U, sigma, used, gram_error = _solve(M, cut, solver)
    return ContextSVD(U if Q is None else Q @ U, sigma, used, gram_error)


def _solve(
    M: torch.Tensor, cut: int, solver: Literal["auto", "gram", "svd"]
) -> tuple[torch.Tensor, torch.Tensor, Literal["gram", "svd"], float]:
    gram_error = 0.0
    if solver in ("auto", "gram"):
        squares, vectors = torch.linalg.eigh(M @ M.T)
        squares, U = squares.flip(-1), vectors.flip(-1)
        gram_error = _gram_error(squares, cut)
        if solver == "gram" or gram_error <= GRAM_ERROR_LIMIT:
            return U, squares.clamp_min(0).sqrt(), "gram", gram_error
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    return U, sigma, "svd", gram_error


def _gram_error(squares: torch.Tensor, cut: int) -> float:
    """Estimated turn of the subspaces on both sides of ``cut``, from the squared singular values (descending)."""
    if cut <= 0 or cut >= len(squares):
        return 0.0
    gap = float(squares[cut - 1] - squares[cut])
    noise = torch.finfo(squares.dtype).eps * float(squares[0])
    return noise / gap if gap > 0 else float("inf")


def component_factors(W: torch.Tensor, decomposition: ContextSVD, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """B = U_r Σ_r^½ (out, r) and A = Σ_r^{-½} U_rᵀ W (r, in) of the chosen components, float64 (Eq. 11 and 13).

    B·A = U_r U_rᵀ W holds whatever is put between the factors; a singular value of zero would put 0·∞ there, so the
    split (not the product) uses σ no smaller than machine epsilon times the largest.
    """
    U, sigma = decomposition.U[:, columns], decomposition.sigma[columns]
    floor = torch.finfo(torch.float64).eps * decomposition.sigma[0].clamp_min(torch.finfo(torch.float64).tiny)
    root = torch.maximum(sigma, floor).sqrt()
    return U * root, (U.T @ W.double()) / root[:, None]
