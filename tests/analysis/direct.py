"""The analyses the plain way: float64, inverses, one unpadded row at a time."""

import math

import torch
from torch import nn


def direct_asvd_factor(mean_absolute: torch.Tensor, alpha: float) -> torch.Tensor:
    """S = diag(mean |x|^α)."""
    return torch.diag(torch.tensor([float(value) ** alpha for value in mean_absolute], dtype=torch.float64))


def direct_context_factor(C: torch.Tensor, damping: float) -> torch.Tensor:
    """C + damping · mean(diag C) · I."""
    C64 = C.double()
    return C64 + torch.eye(len(C64), dtype=torch.float64) * damping * C64.trace() / len(C64)


def truncated(W: torch.Tensor, factor: torch.Tensor, r: int) -> torch.Tensor:
    """SVD(W·T) without its r smallest components, times T⁻¹ (CorDA++ Eq. 3), float64."""
    U, sigma, Vh = torch.linalg.svd(W.double() @ factor, full_matrices=False)
    kept = len(sigma) - r
    return U[:, :kept] @ torch.diag(sigma[:kept]) @ Vh[:kept] @ torch.linalg.inv(factor)


def direct_inputs(model: nn.Module, layers: list[str], texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Every layer's inputs at all tokens of ``texts``, (tokens, in), float64."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0][0].double())
        )
        for name in layers
    ]
    with torch.no_grad():
        for ids in texts:
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def direct_perplexity(model: nn.Module, texts: list[list[int]]) -> float:
    """exp of the mean of −log p(next token) over all tokens but the first of each text, summed in float64."""
    losses = []
    with torch.no_grad():
        for ids in texts:
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
            chances = logits - logits.logsumexp(-1, keepdim=True)
            losses += [-float(chances[position, ids[position + 1]]) for position in range(len(ids) - 1)]
    return math.exp(math.fsum(losses) / len(losses))
