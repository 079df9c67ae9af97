"""CO-SVD as the paper writes it, in float64, with everything that the harness leaves out: C̃⁻¹ and the right vectors."""

import torch


def paper_block(W: torch.Tensor, C: torch.Tensor, damping: float, rank: int, mode: str) -> torch.Tensor:
    """B·A of CorDA++ Eq. 11 (``kpm``: the smallest components) or Eq. 13 (``ipm``: the largest), (out, in), float64."""
    W64, C64 = W.double(), C.double()
    C_damped = C64 + damping * C64.diagonal().mean() * torch.eye(len(C64), dtype=torch.float64)
    inverse = torch.linalg.inv(C_damped)
    U, sigma, Vh = torch.linalg.svd(W64 @ C_damped, full_matrices=True)  # Eq. 2
    components = min(W.shape)  # U and V hold further vectors, which belong to no component
    V_hat = (Vh @ inverse)[:components]  # Eq. 3
    U = U[:, :components]
    chosen = slice(components - rank, components) if mode == "kpm" else slice(0, rank)
    root = sigma[chosen].sqrt()
    B = U[:, chosen] * root
    A = root[:, None] * V_hat[chosen]
    return B @ A


def outlier_problem(
    out_features: int, in_features: int, tokens: int, seed: int = 0, factor: float = 60.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a covariance, fp32; a few channels stand ``factor`` times above the rest in weight and input."""
    generator = torch.Generator().manual_seed(seed)
    outliers = torch.randperm(in_features, generator=generator)[:4]
    W = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    W[:, outliers[:2]] *= factor
    # Directions of different strength beside the outliers: inputs of real layers are far from white.
    strength = torch.logspace(0, -1, in_features)
    mixing = torch.linalg.qr(torch.randn(in_features, in_features, generator=generator))[0]
    X = torch.randn(tokens, in_features, generator=generator) * strength @ mixing
    X[:, outliers] *= factor
    return W, X.T @ X / tokens
