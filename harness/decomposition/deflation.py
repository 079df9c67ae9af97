"""The smallest components of a matrix with a few very large ones, from a Gram matrix that does not square those.

Outlier channels make σ₁ of W·C̃ thousands of times the rest. The Gram matrix M Mᵀ then carries an absolute error of
ε·σ₁², beside which the smallest σ² and the gaps between them may be nothing. But the largest components are easy: a few
steps of subspace iteration on M itself give an orthonormal Q (n, p) that holds them and has next to nothing of the
smallest ones; the further they stand out, the fewer. With M' = M − Q·QᵀM the singular vectors of the smallest
components are those of M', whose largest singular value is σ_{p+1}; forming M' costs an error of ε·σ₁ alone, not
squared. Its Gram matrix, with the directions of Q moved up out of the way, is then as accurate as one without outliers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.decomposition.gram import gram_matrix
from harness.decomposition.partial import PartialEigen, lapack_subset, largest_eigenvalue

OUTLIERS = 32  # the most that are taken out
OUTSTANDING = 50  # times the mean of the other eigenvalues of M Mᵀ: what stands out
SHARE = 1e-6  # of λ₁: directions above it are taken out, with an error of ε / SHARE at most
MIXED = 1e-12  # what the taken directions may have of the smallest ones
_EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class LeadingSpace:
    """``basis``: Q (n, p), orthonormal; ``coefficients``: QᵀM (p, m); ``largest``: λ₁ of M Mᵀ, a Ritz value."""

    basis: torch.Tensor
    coefficients: torch.Tensor
    largest: float


def outlier_space(M: torch.Tensor) -> LeadingSpace | None:
    """A space with the largest left singular vectors of M (n, m) and hardly any of the smallest.

    None where no eigenvalue of M Mᵀ stands so far above the others that outliers decide the Gram matrix's rounding.
    Subspace iteration: after j steps a direction of eigenvalue λ has about (mean of the others / λ)ʲ of the smallest.
    """
    n, total = len(M), float(torch.linalg.vector_norm(M)) ** 2
    if not 0 < total < math.inf:
        return None
    start = torch.randn(n, OUTLIERS, generator=torch.Generator().manual_seed(0), dtype=M.dtype)
    steps, coefficients = 0, start.T @ M
    while True:
        # A few rows times M or Mᵀ: of tall products with few columns some layouts are ten times as slow.
        Q = torch.linalg.qr((coefficients @ M.T).T)[0]
        steps, coefficients = steps + 1, Q.T @ M
        values, turn = torch.linalg.eigh(coefficients @ coefficients.T)
        largest = float(values[-1])
        # What is left of the sum after the largest is rounding where it is small enough.
        others = max((total - float(values.sum())) / (n - OUTLIERS), n * _EPSILON * largest)
        if steps == 1 and largest <= OUTSTANDING * others:
            return None
        outstanding = values > max(SHARE * largest, OUTSTANDING * others)
        weakest = float(values[outstanding].min())
        if (others / weakest) ** steps <= MIXED:
            turn = turn[:, outstanding]
            return LeadingSpace(Q @ turn, turn.T @ coefficients, largest)


def smallest_deflated(M: torch.Tensor, counts: Sequence[int]) -> PartialEigen | None:
    """The k = max(``counts``) smallest eigenpairs of M Mᵀ; None where M has no outliers or they cannot be had this way.

    Args:
        M: (n, m), n ≤ m, float64, on the CPU; it comes back as it was, up to rounding.
        counts: as for `harness.decomposition.partial.partial_eigen`.

    Returns:
        Values and vectors of M' (see the module); ``gram_error`` estimates the turn at each cut from rounding of its
        Gram matrix, of M' itself, and from what Q has of the wanted vectors. ``largest`` is that of M Mᵀ.
    """
    n, k = len(M), max(counts)
    if n < 4 * OUTLIERS + 4 * k or (space := outlier_space(M)) is None:
        return None
    Q, coefficients, largest = space.basis, space.coefficients, space.largest
    # In place and back, which rounds like forming M did: a second M would be the largest thing in memory.
    M.addmm_(Q, coefficients, alpha=-1)
    inner = gram_matrix(M)
    M.addmm_(Q, coefficients)
    top = largest_eigenvalue(inner)
    if not math.isfinite(top) or top <= 0:
        return None
    found = lapack_subset(inner.addmm_(Q, Q.T, alpha=2 * top), counts, "smallest", 2 * top)
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
    # What couples the wanted vectors X with Q in M Mᵀ: QᵀM·(XᵀM)ᵀ, over the distance of their eigenvalues.
    coupled = coefficients @ (found.vectors.T @ M).T
    distance = (coefficients.square().sum(1) - found.beyond).clamp_min(1e-300)
    tilt = float((coupled / distance[:, None]).norm())
    return PartialEigen(found.values, found.vectors, found.beyond, largest, error + tilt)
