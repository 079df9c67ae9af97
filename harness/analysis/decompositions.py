"""The decompositions that are compared: SVD(W·T) for a right factor T that data may choose (CorDA++, §III-B, §III-C).

Plain SVD has T = I, ASVD (Yuan et al., 2023) the diagonal T = S with S_jj = (mean_t |x_tj|)^α, CO-SVD T = C̃, the damped
input covariance.

Truncation needs no inverse of T. With W·T = U Σ Vᵀ, leaving out the components in the columns U_r gives
U_k Σ_k V_kᵀ T⁻¹ = U_k U_kᵀ W = W − U_r U_rᵀ W, for every invertible T.
"""

import torch

SCALE_FLOOR = 1e-6


def identity_factor(W: torch.Tensor) -> torch.Tensor:
    """Plain SVD's T = I for a weight (out, in): (in, in), float64, on the weight's device."""
    return torch.eye(W.shape[1], dtype=torch.float64, device=W.device)


def asvd_factor(mean_absolute: torch.Tensor, alpha: float) -> torch.Tensor:
    """ASVD's S as a matrix (in, in), float64, from mean |x| per channel (in,).

    Channels below `SCALE_FLOOR` times the mean are raised to it, so that S is invertible: a channel may be silent on
    the calibration rows and not elsewhere.
    """
    magnitude = mean_absolute.double()
    return torch.diag(torch.maximum(magnitude, SCALE_FLOOR * magnitude.mean()).pow(alpha))


def discard(W: torch.Tensor, U: torch.Tensor, count: int) -> torch.Tensor:
    """W without its ``count`` last components: W − U_r U_rᵀ W, in the dtype of ``U``.

    Args:
        W: weight, (out, in).
        U: left singular vectors of W·T as columns, (out, R), in the order of descending singular values.
    """
    tail = U[:, U.shape[1] - count :]
    whole = W.to(U.dtype)
    return whole - tail @ (tail.T @ whole)
