"""The Gram matrix M Mᵀ at little more than half of its cost: the upper triangle in row blocks, mirrored."""

import torch

ROWS = 256  # of a block: with fewer a product is too small to be fast


def gram_matrix(M: torch.Tensor) -> torch.Tensor:
    """M Mᵀ, (n, n), exactly symmetric, for ``M`` (n, m)."""
    n = len(M)
    G = M.new_empty(n, n)
    for first in range(0, n, ROWS):
        last = min(first + ROWS, n)
        G[first:last, first:] = M[first:last] @ M[first:].T
        G[last:, first:last] = G[first:last, last:].T
        own = G[first:last, first:last]
        own.copy_((own + own.T) / 2)
    return G
