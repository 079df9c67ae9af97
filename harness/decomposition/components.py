"""Single components of a weight's SVD, and quartiles of its singular values, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from harness.decomposition.partial import Solver
from harness.decomposition.plain_svd import PlainSVD, plain_svd

VALUE_LIMIT = 1e-12  # relative error above which a quartile is taken from the SVD and not from the Gram matrix


@dataclass(frozen=True)
class Components:
    """``U`` (out, k), ``V`` (in, k) with orthonormal columns; ``sigma`` (k,); float64. ``solver``: the path taken."""

    U: torch.Tensor
    sigma: torch.Tensor
    V: torch.Tensor
    solver: Literal["gram", "svd", "partial"]


def chosen_components(W: torch.Tensor, chosen: Sequence[int], solver: Solver = "auto") -> Components:
    """The components ``chosen`` of W (out, in), counted from the largest singular value, ascending.

    The vectors of the smaller side come from `plain_svd`, accurate at each component's own cuts.
    """
    cuts = sorted({cut for index in chosen for cut in (index, index + 1)})
    return both_sides(W, plain_svd(W, cuts, solver, "first"), chosen)


def both_sides(W: torch.Tensor, decomposition: PlainSVD, columns: Sequence[int]) -> Components:
    """Both singular vectors of some components of W (out, in) that ``decomposition`` holds.

    The larger side's are Wᵀu/σ (or Wv/σ), made orthonormal, largest first, so that components of σ = 0 have some
    vectors, too.
    """
    own = decomposition.vectors[:, list(columns)]
    projected = (W.double().T if decomposition.side == "left" else W.double()) @ own
    sigma = projected.norm(dim=0)
    other, R = torch.linalg.qr(projected)
    other = other * torch.where(R.diagonal() < 0, -1.0, 1.0).to(other.dtype)
    U, V = (own, other) if decomposition.side == "left" else (other, own)
    return Components(U, sigma, V, decomposition.solver)


def singular_value_quartile(W: torch.Tensor, quartile: int) -> float:
    """The ``quartile``-th quartile (1 to 4) of the min(out, in) singular values of W (out, in), ascending.

    By numpy's definition (linear interpolation): 1 is the 25th percentile, 4 the largest value.
    """
    M = W.double() if W.shape[0] <= W.shape[1] else W.double().T
    squares = torch.linalg.eigvalsh(M @ M.T).clamp_min(0)
    value = _quantile(squares.sqrt(), quartile)
    # An eigenvalue λ is wrong by about ε·λ₁, hence σ = √λ by ε·λ₁ / 2σ.
    noise = torch.finfo(squares.dtype).eps * float(squares[-1])
    if noise > 2 * VALUE_LIMIT * value**2:
        value = _quantile(torch.linalg.svdvals(M), quartile)
    return value


def _quantile(values: torch.Tensor, quartile: int) -> float:
    return float(torch.quantile(values, quartile / 4))
