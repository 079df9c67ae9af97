"""Plain SVD of a matrix in float64, from its smaller side.

W = U Σ Vᵀ. With the singular vectors of the smaller side alone (U of a wide matrix, V of a tall one) a block of
components is a projection, U_r U_rᵀ W = U_r Σ_r V_rᵀ = W V_r V_rᵀ, so the other side is one product and nothing is
divided by a small singular value. (It is the CO-SVD of `context_svd` with C̃ = I, without that identity.)

Warning:
    The vectors come from the float64 eigendecomposition of the Gram matrix, which squares the singular values. As in
    `context_svd`, the turn of the subspaces at each cut that the caller needs is estimated, ε·σ₁² / (σ_k² − σ_{k+1}²),
    and above `GRAM_ERROR_LIMIT` the float64 SVD takes over. Between two equal singular values no cut is unique.

Where the components on one side of the cuts are enough, the partial solver may find them alone
(`harness.decomposition.partial`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from harness.decomposition.gram import gram_matrix
from harness.decomposition.partial import (
    GRAM_ERROR_LIMIT,
    Needed,
    Solver,
    estimated_gram_error,
    needed_columns,
    needed_eigenpairs,
)


@dataclass(frozen=True)
class PlainSVD:
    """The components of W that were asked for: all R = min(out, in), those before the cuts or those after them.

    ``vectors``: singular vectors of the smaller side as columns, (R, k), float64, each with its largest entry > 0.
    ``side``: whose they are, ``left`` (U) where out ≤ in, else ``right`` (V). ``sigma``: singular values, (k,),
    descending. ``solver`` is the path taken; ``gram_error`` is the estimate that decided it. ``largest``: of all R
    singular values; the partial solver has it from a small Krylov space where the components are not the first.
    """

    vectors: torch.Tensor
    side: Literal["left", "right"]
    sigma: torch.Tensor
    solver: Literal["gram", "svd", "partial"]
    gram_error: float
    largest: float


def plain_svd(W: torch.Tensor, cuts: int | Sequence[int], solver: Solver = "auto", needed: Needed = "all") -> PlainSVD:
    """Singular values of ``W`` (out, in) and the singular vectors of its smaller side.

    Args:
        W: any floating dtype.
        cuts: the caller separates the first k components from the rest, for each k given; accuracy is judged there.
        solver: ``auto`` takes the partial solver where it is expected to be faster, else the Gram matrix, and falls
            back to the SVD where the Gram matrix is not accurate enough. ``partial`` tries the partial solver first.
        needed: the components to return, ``first``: before the last cut, ``rest``: after the first. Only then a partial
            solver can be of use.
    """
    side: Literal["left", "right"] = "left" if W.shape[0] <= W.shape[1] else "right"
    M = W.double() if side == "left" else W.double().T
    cuts = [cuts] if isinstance(cuts, int) else cuts
    columns = needed_columns(needed, cuts)
    gram_error = 0.0
    if solver != "svd":
        G = gram_matrix(M)
        found = needed_eigenpairs(G, cuts, needed, solver)
        if found is not None:
            gram_error = found.gram_error
            if gram_error <= GRAM_ERROR_LIMIT:
                largest, sigma = max(found.largest, 0.0) ** 0.5, found.values.clamp_min(0).sqrt()
                return PlainSVD(oriented(found.vectors), side, sigma, "partial", gram_error, largest)
        else:
            squares, vectors = torch.linalg.eigh(G)
            squares, vectors = squares.flip(-1), vectors.flip(-1)
            gram_error = max(estimated_gram_error(squares, cut) for cut in cuts)
            if solver == "gram" or gram_error <= GRAM_ERROR_LIMIT:
                kept, sigma = vectors[:, columns], squares.clamp_min(0).sqrt()
                return PlainSVD(oriented(kept), side, sigma[columns], "gram", gram_error, float(sigma[0]))
    vectors, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    return PlainSVD(oriented(vectors[:, columns]), side, sigma[columns], "svd", gram_error, float(sigma[0]))


def oriented(vectors: torch.Tensor) -> torch.Tensor:
    """Columns with the sign that makes the entry of largest magnitude positive, whichever sign the solver chose."""
    return vectors * signs(vectors)


def signs(vectors: torch.Tensor) -> torch.Tensor:
    """±1 per column, (columns,): the sign of the entry of largest magnitude."""
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def balanced_factors(
    W: torch.Tensor, decomposition: PlainSVD, columns: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """B = U_r Σ_r^½ (out, r) and A = Σ_r^½ V_rᵀ (r, in) of the chosen components, float64.

    ``columns``: of those that ``decomposition`` holds.

    Each component is split by its own norm in the projected matrix, which equals its singular value and is accurate
    where the eigenvalue of the Gram matrix is mere rounding; norms of zero are replaced by machine epsilon times σ₁.
    """
    vectors = decomposition.vectors[:, columns]
    projected = vectors.T @ W.double() if decomposition.side == "left" else (W.double() @ vectors).T
    floor = torch.finfo(torch.float64).eps * max(decomposition.largest, torch.finfo(torch.float64).tiny)
    root = projected.norm(dim=1).clamp_min(floor).sqrt()
    own, other = vectors * root, projected / root[:, None]
    return (own, other) if decomposition.side == "left" else (other.T, own.T)
