"""The smallest components of a matrix with a few very large ones, from a Gram matrix that does not square those.

Outlier channels make σ₁ of W·C̃ thousands of times the rest. The Gram matrix M Mᵀ then carries an absolute error of
ε·σ₁², beside which the smallest σ² and the gaps between them may be nothing. But the largest components are easy: a few
steps of subspace iteration give an orthonormal Q (n, p) that holds them and has next to nothing of the smallest ones.
With M' = M − Q·QᵀM the singular vectors of the smallest components are those of M', whose largest singular value is
σ_{p+1}; forming M' costs an error of ε·σ₁ alone, not squared. Its Gram matrix, with the directions of Q moved up out of
the way, is then as accurate as one without outliers.
"""

import math
from collections.abc import Sequence

import torch

from harness.decomposition.gram import gram_matrix
from harness.decomposition.partial import PartialEigen, lapack_subset, largest_eigenvalue

OUTLIERS = 32  # the most that are taken out
ITERATIONS = 12
SHARE = 1e-6  # of λ₁: directions above it are taken out, with an error of ε / SHARE at most
_EPSILON = torch.finfo(torch.float64).eps


def dominated(G: torch.Tensor) -> bool:
    """Whether the largest eigenvalue of G (n, n) stands so far above the mean that outliers decide its rounding."""
    return largest_eigenvalue(G) > 50 * float(G.diagonal().mean())


def smallest_deflated(M: torch.Tensor, G: torch.Tensor, counts: Sequence[int]) -> PartialEigen | None:
    """The k = max(``counts``) smallest eigenpairs of G = M Mᵀ; None where they cannot be had this way.

    Args:
        M: (n, m), n ≤ m, float64, on the CPU; it comes back as it was, up to rounding.
        G: its Gram matrix, (n, n).
        counts: as for `harness.decomposition.partial.partial_eigen`.

    Returns:
        Values and vectors of M' (see the module); ``gram_error`` estimates the turn at each cut from rounding of its
        Gram matrix, of M' itself, and from what Q has of the wanted vectors. ``largest`` is that of G.
    """
    n, k = len(G), max(counts)
    if n < 4 * OUTLIERS + 4 * k:
        return None
    Q, largest = _leading_space(G)
    coefficients = Q.T @ M
    # In place and back, which rounds like forming M did: a second M would be the largest thing in memory.
    M.addmm_(Q, coefficients, alpha=-1)
    inner = gram_matrix(M)
    M.addmm_(Q, coefficients)
    top = largest_eigenvalue(inner)
    if not math.isfinite(top) or top <= 0:
        return None
    found = lapack_subset(inner + (2 * top) * (Q @ Q.T), counts, "smallest", 2 * top)
    if found is None:
        return None
    sigma = found.values.clamp_min(0).sqrt()
    below = [0.0, *sigma.flip(0).tolist(), max(found.beyond, 0.0) ** 0.5]  # ascending, the first of no meaning
    error = 0.0
    for count in (count for count in counts if count > 0):
        gap = below[count + 1] - below[count]
        squared_gap = below[count + 1] ** 2 - below[count] ** 2
        if gap <= 0:
            return None
        rounding = _EPSILON * top / squared_gap
        forming = math.sqrt(n) * _EPSILON * largest**0.5 / gap
        error = max(error, rounding + forming)
    # What couples the wanted vectors X with Q in G itself: QᵀM·(XᵀM)ᵀ, over the distance of their eigenvalues.
    coupled = coefficients @ (found.vectors.T @ M).T
    distance = (coefficients.square().sum(1) - found.beyond).clamp_min(1e-300)
    tilt = float((coupled / distance[:, None]).norm())
    return PartialEigen(found.values, found.vectors, found.beyond, largest, found.residual_error, error + tilt)


def _leading_space(G: torch.Tensor) -> tuple[torch.Tensor, float]:
    """An orthonormal basis (n, p) of a space with the largest eigenvectors of G and hardly any of the smallest; λ₁."""
    start = torch.randn(len(G), OUTLIERS, generator=torch.Generator().manual_seed(0), dtype=G.dtype)
    Q = torch.linalg.qr(start)[0]
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(G @ Q)[0]
    values, turn = torch.linalg.eigh(Q.T @ G @ Q)
    # G's own rounding, ε·λ₁, puts something of every direction into the vectors of small eigenvalues; those stay in M'.
    return Q @ turn[:, values > SHARE * values[-1]], float(values[-1])
