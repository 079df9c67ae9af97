"""CorDA++ as the paper writes it, in float64, with what the harness leaves out: C̃⁻¹, right vectors, loops."""

import math

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


def paper_log_pi(C_damped: torch.Tensor, out_features: int) -> float:
    """log π(C) from all singular values of C (CorDA++, below Eq. 6)."""
    values = torch.linalg.svd(C_damped.double())[1]
    return math.log(math.sqrt(out_features * float(values[0])) / float(values[-1]))


def paper_selection_score(W: torch.Tensor, C: torch.Tensor, damping: float) -> float:
    """Eq. 7 from full decompositions of C and W·C, summed one by one from the last component to the first."""
    C64 = C.double()
    C_damped = C64 + damping * C64.diagonal().mean() * torch.eye(len(C64), dtype=torch.float64)
    sigma = torch.linalg.svd(W.double() @ C_damped)[1].tolist()
    return paper_log_pi(C_damped, len(W)) * math.fsum(sigma[-r] / max(sigma) for r in range(1, len(sigma) + 1))


def paper_filtering(
    sigmas: list[list[float]], log_pis: list[float], costs: list[int], budget: int, mode: str
) -> tuple[list[int], list[int]]:
    """Algorithm 2, literally: the layers in the order in which they are taken, and the final r of each.

    Ours at the ends, which the paper leaves open: a layer with r = R is not taken again; IPM looks at the budget
    before the first step too; KPM undoes the step that exceeded the budget.
    """
    layers = range(len(sigmas))
    r = [1 for _ in layers]
    taken: list[int] = []

    def parameters() -> int:
        return sum(costs[layer] * (r[layer] if mode == "kpm" else len(sigmas[layer]) - r[layer]) for layer in layers)

    def score(layer: int) -> float:  # Eq. 9
        sigma, R = sigmas[layer], len(sigmas[layer])
        return log_pis[layer] * (sigma[-r[layer]] / math.fsum(sigma[: R - r[layer]]))

    while mode == "kpm" or parameters() > budget:
        scores = {layer: score(layer) for layer in layers if r[layer] < len(sigmas[layer])}
        if not scores:
            break
        chosen = min(scores, key=lambda layer: scores[layer])  # arg min: the first of equals
        r[chosen] += 1
        taken.append(chosen)
        if mode == "kpm" and parameters() > budget:
            r[chosen] -= 1
            taken.pop()
            break
    return taken, r
