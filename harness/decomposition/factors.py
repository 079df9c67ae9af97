"""The singular value decomposition of B·A from its factors: the (out, in) product is never formed.

With QR decompositions B = Q_B R_B and Aᵀ = Q_A R_A the product is Q_B (R_B R_Aᵀ) Q_Aᵀ. Q_B and Q_A have orthonormal
columns, so the SVD U' Σ V'ᵀ of the r×r core R_B R_Aᵀ gives U = Q_B U', V = Q_A V', and both norms are those of Σ. Cost:
O((out + in)·r² + r³), against O(out·in·min(out, in)) for the dense product. Unlike the r×r Gram matrices
BᵀB and AAᵀ, whose eigenvalues are squared singular values, QR keeps small singular values to machine precision.
"""

from dataclasses import dataclass

import torch

from harness.decomposition.partial import Solver
from harness.decomposition.plain_svd import plain_svd


@dataclass(frozen=True)
class FactoredSVD:
    """The singular values of a product that are not mere rounding, descending, and their vectors, all float64.

    ``U`` (out, k), ``sigma`` (k,), ``V`` (in, k), columns orthonormal; k = 0 for a product of zero.
    """

    U: torch.Tensor
    sigma: torch.Tensor
    V: torch.Tensor

    @property
    def spectral_norm(self) -> float:
        """σ₁; 0 for a product of zero."""
        return float(self.sigma[0]) if len(self.sigma) else 0.0

    @property
    def frobenius_norm(self) -> float:
        """√Σσ²."""
        return float(self.sigma.norm())


def factored_svd(B: torch.Tensor, A: torch.Tensor, scaling: float = 1.0) -> FactoredSVD:
    """The SVD of scaling · B @ A, in float64 on the factors' device.

    Singular values up to 8·r·ε times ‖R_B‖·‖R_A‖ are left out: the product [B, −B]·[A; A] of a residual method at
    step 0 is zero, and what rounding leaves of it has singular vectors that mean nothing.

    Args:
        B: (out, r), any floating dtype; r may be 0, or above out and in.
        A: (r, in).
        scaling: any sign.
    """
    rank = A.shape[0]
    if rank == 0:
        empty = torch.zeros(0, dtype=torch.float64, device=B.device)
        return FactoredSVD(empty.new_zeros(B.shape[0], 0), empty, empty.new_zeros(A.shape[1], 0))
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, sigma, Vh = torch.linalg.svd(scaling * (R_B @ R_A.T), full_matrices=False)
    rounding = 8 * rank * torch.finfo(torch.float64).eps * abs(scaling) * float(R_B.norm() * R_A.norm())
    k = int((sigma > rounding).sum())
    return FactoredSVD(Q_B @ U[:, :k], sigma[:k], Q_A @ Vh[:k].T)


def orthogonality_error(U: torch.Tensor, V: torch.Tensor) -> float:
    """‖UᵀU − I‖_F + ‖VᵀV − I‖_F of ``U`` (out, r) and ``V`` (in, r), float64 (FCLoRA, Fig. 7)."""
    error = 0.0
    for vectors in (U.double(), V.double()):
        gram = vectors.T @ vectors
        gram.diagonal().sub_(1.0)
        error += float(gram.norm())
    return error


def leading_svd(W: torch.Tensor, rank: int, solver: Solver = "auto") -> FactoredSVD:
    """The ``rank`` largest singular values of a dense ``W`` (out, in) and their vectors, through `plain_svd`.

    The vectors of the larger side are the projections of the smaller side's, divided by their own norms. Values of
    rounding size are left out, as in `factored_svd`.
    """
    rank = min(rank, *W.shape)
    found = plain_svd(W, rank, solver, "first")
    rounding = max(W.shape) * torch.finfo(torch.float64).eps * found.largest
    W64 = W.double()
    own = found.vectors
    other = W64.T @ own if found.side == "left" else W64 @ own
    sigma = other.norm(dim=0)  # accurate where the Gram matrix's eigenvalue is not
    kept = sigma > rounding
    own, other = own[:, kept], other[:, kept] / sigma[kept]
    U, V = (own, other) if found.side == "left" else (other, own)
    return FactoredSVD(U, sigma[kept], V)
