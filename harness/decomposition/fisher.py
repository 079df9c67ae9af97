"""What FARSS reads from a layer's K-FAC factors: importance, inverse rank allocation, scores of singular directions.

Chen et al., "FARSS" (§3.2, §3.3). With F ≈ Σ_h ⊗ Σ_δ (Eq. 2), Σ_h the input covariance and Σ_δ the output-gradient
covariance of a layer, the loss changes by about ½·Tr(Σ_δ ΔW Σ_h ΔWᵀ) under a small change ΔW (Eq. 6).

Everything is computed in float64: scores of a layer span many orders of magnitude, and the low ones are the ones that
shallow layers take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

EPSILON = 1e-12  # Eq. 9, as a share of the importances' sum: the importance itself has the scale of a squared gradient


def importance(W: torch.Tensor, input_covariance: torch.Tensor, output_gradient_covariance: torch.Tensor) -> float:
    """I = Tr(Σ_δ W Σ_h Wᵀ) / (out · in): the loss increase of a small relative change of the layer (Eq. 8).

    Args:
        W: weight, (out, in), any floating dtype.
        input_covariance: Σ_h, (in, in).
        output_gradient_covariance: Σ_δ, (out, out).
    """
    W64 = W.double()
    # Tr(X Yᵀ) is the sum of X ⊙ Y, with X = Σ_δ W and Y = W Σ_h.
    trace = ((output_gradient_covariance.double() @ W64) * (W64 @ input_covariance.double())).sum()
    return max(0.0, float(trace)) / W.numel()


def inverse_ranks(importances: Sequence[float], r_min: int, r_avg: int, r_max: int) -> list[int]:
    """Ranks inversely proportional to importance, rounded and clipped to [r_min, r_max] (Eq. 9–12).

    Where every importance is zero all layers weigh the same. Rounding and clipping may leave the ranks' sum below or
    above the budget r_avg · len(importances) (Eq. 10), and the paper does not correct that.
    """
    total = math.fsum(importances)
    weights = [1 / (value / total + EPSILON) if total > 0 else 1.0 for value in importances]
    share = r_avg * len(importances) / math.fsum(weights) if weights else 0.0
    return [min(max(round(share * weight), r_min), r_max) for weight in weights]


@dataclass(frozen=True)
class ScoredDirections:
    """The singular directions of a weight by descending score, k = min(out, in) of them, float64.

    ``U`` (out, k), ``sigma`` (k,), ``Vh`` (k, in): columns, values and rows of one decomposition W = U Σ Vᵀ, reordered.
    ``scores`` (k,). ``index`` (k,): where each direction stood when they were ordered by descending singular value.
    """

    U: torch.Tensor
    sigma: torch.Tensor
    Vh: torch.Tensor
    scores: torch.Tensor
    index: torch.Tensor


def full_svd(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (out, k), σ (k,), Vᵀ (k, in) of W (out, in), k = min(out, in), float64.

    Not through the Gram matrix: its vectors of neighbouring singular values turn into each other, which moves no
    subspace across a cut but changes the scores of single directions.
    """
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U, sigma, Vh


def scored_directions(
    W: torch.Tensor,
    input_covariance: torch.Tensor,
    output_gradient_covariance: torch.Tensor,
    svd: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> ScoredDirections:
    """Singular directions of W (out, in) by s_i = σ_i² · v_iᵀ Σ_h v_i · u_iᵀ Σ_δ u_i, descending (Eq. 13–15).

    Of two directions of equal score the one of larger singular value comes first. ``svd``: `full_svd` of W, if it is
    known already.
    """
    U, sigma, Vh = full_svd(W) if svd is None else svd
    # Covariances have no negative direction; rounding can make one of -1e-17.
    in_inputs = ((Vh @ input_covariance.double()) * Vh).sum(1).clamp_min(0)
    in_gradients = ((output_gradient_covariance.double() @ U) * U).sum(0).clamp_min(0)
    scores = sigma.square() * in_inputs * in_gradients
    index = torch.argsort(scores, descending=True, stable=True)
    return ScoredDirections(U[:, index], sigma[index], Vh[index], scores[index], index)


def direction_factors(directions: ScoredDirections, chosen: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """B = U √Σ (out, r) and A = √Σ Vᵀ (r, in) of the chosen directions, float64 (Eq. 16 and 17).

    B·A = U Σ Vᵀ whatever is put between the factors. A singular value of zero would make both factors zero, and then
    neither ever gets a gradient; so the split (not the product) uses σ no smaller than machine epsilon times the
    largest.
    """
    U, sigma, Vh = directions.U[:, chosen], directions.sigma[chosen], directions.Vh[chosen]
    smallest = torch.finfo(torch.float64)
    floor = smallest.eps * directions.sigma.max().clamp_min(smallest.tiny)
    root = torch.maximum(sigma, floor).sqrt()
    return U * root, Vh * (sigma / root)[:, None]
