"""FARSS §3.2 and §3.3 as the paper writes them, entry by entry in float64."""

import torch

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def fisher_problem(out_features: int, in_features: int, tokens: int = 4000, seed: int = 0) -> Problem:
    """W, Σ_h and Σ_δ, fp32: outlier channels in weight and input, gradients of very different strength."""
    from tests.decomposition.reference import outlier_problem

    W, input_covariance = outlier_problem(out_features, in_features, tokens, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    deltas = torch.randn(tokens, out_features, generator=generator) * torch.logspace(-2, -5, out_features)
    deltas = deltas @ torch.linalg.qr(torch.randn(out_features, out_features, generator=generator))[0]
    return W, input_covariance, deltas.T @ deltas / tokens


def paper_importance(W: torch.Tensor, input_covariance: torch.Tensor, gradient_covariance: torch.Tensor) -> float:
    """Eq. 8."""
    W, H, D = W.double(), input_covariance.double(), gradient_covariance.double()
    m, n = W.shape
    return float(torch.trace(D @ W @ H @ W.T)) / (m * n)


def paper_ranks(importances: list[float], epsilon: float, r_min: int, r_avg: int, r_max: int) -> list[int]:
    """Eq. 9 to 12."""
    omega = [1 / (value + epsilon) for value in importances]
    total = r_avg * len(importances)
    raw = [total / sum(omega) * value for value in omega]
    return [int(min(max(round(value), r_min), r_max)) for value in raw]


def paper_scores(W: torch.Tensor, input_covariance: torch.Tensor, gradient_covariance: torch.Tensor) -> list[float]:
    """Eq. 15 for each singular direction, by descending singular value."""
    W, H, D = W.double(), input_covariance.double(), gradient_covariance.double()
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    return [float(sigma[i] ** 2 * (Vh[i] @ H @ Vh[i]) * (U[:, i] @ D @ U[:, i])) for i in range(len(sigma))]


def paper_choice(
    W: torch.Tensor, input_covariance: torch.Tensor, gradient_covariance: torch.Tensor, rank: int, low: bool
) -> tuple[list[int], torch.Tensor]:
    """Chosen directions, as numbers in the order of singular values, and their block B·A (Eq. 16 or 17), float64."""
    scores = paper_scores(W, input_covariance, gradient_covariance)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: of equal scores the larger singular value
    chosen = order[len(order) - rank :] if low else order[:rank]
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    block = torch.zeros(W.shape, dtype=torch.float64)
    for i in chosen:
        block += sigma[i] * torch.outer(U[:, i], Vh[i])
    return chosen, block
