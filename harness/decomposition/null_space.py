"""The directions in which inputs hardly vary: the bottom eigenvectors of an input covariance.

LoRA-Null (Tang et al., 2025, arXiv 2503.02659) takes the last left singular vectors of the inputs X of a layer, which
are the eigenvectors of C = X Xᵀ with the smallest eigenvalues. C of more tokens than channels has full rank as a rule,
so this is a null space only nearly; `NullSpace.energy` says how nearly. Where C is truly singular (fewer tokens than
channels) "the last k" of many directions of eigenvalue zero would be rounding's choice, so all of them are taken.

The dimension of the true null space is counted on the correlation matrix D^{-½} C D^{-½}, D = diag(C), which has the
same one (Sylvester's law of inertia): C is a sum of products in fp32, whose rounding of entry (i, j) is in proportion
to √(C_ii C_jj), so there it is the same everywhere, however far some channels stand above the rest.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NullSpace:
    """``basis``: orthonormal columns, (in, k), float64. ``energy``: their share of the trace of C, 0 to 1.

    ``exact``: how many directions have no energy at all, to the rounding of C.
    """

    basis: torch.Tensor
    energy: float
    exact: int


def null_space(covariance: torch.Tensor, directions: int) -> NullSpace:
    """The ``directions`` bottom eigenvectors of ``covariance`` (in, in), and all others whose eigenvalue is zero.

    A whole space (k = in) comes back where the covariance is zero.
    """
    C = covariance.double()
    values, vectors = torch.linalg.eigh(C)
    values = values.clamp_min(0)
    exact = _nullity(C)
    k = max(directions, exact)
    trace = float(values.sum())
    return NullSpace(vectors[:, :k], float(values[:k].sum()) / trace if trace > 0 else 0.0, exact)


def _nullity(C: torch.Tensor) -> int:
    """How many eigenvalues of ``C``, a float64 copy of sums in fp32, are zero to rounding."""
    size = C.diagonal().clamp_min(0).sqrt()
    alive = size > 0
    correlation = C[alive][:, alive] / size[alive][:, None] / size[alive]
    if correlation.numel() == 0:
        return len(C)
    # The norm of a matrix of independent roundings grows with the root of its size; 4 keeps clear of it.
    noise = 4 * torch.finfo(torch.float32).eps * len(correlation) ** 0.5
    return int((~alive).sum()) + int((torch.linalg.eigvalsh(correlation) < noise).sum())
