"""Initial adapters as their papers write them, in float64, from full decompositions."""

import torch

from tests.decomposition.reference import outlier_problem

SHAPES = [(96, 96), (160, 64), (64, 160)]


def weight_of(shape: tuple[int, int], kind: str) -> torch.Tensor:
    """``outliers``: two input channels 60 times the rest; ``deficient``: of rank 40 besides; ``half``: in bf16."""
    W, _ = outlier_problem(*shape, 10)
    if kind == "deficient":
        U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        sigma[40:] = 0
        W = (U @ torch.diag(sigma) @ Vh).float()
    return W.bfloat16() if kind == "half" else W


def pissa(W: torch.Tensor, rank: int) -> torch.Tensor:
    """B·A: the ``rank`` largest components of W."""
    U, sigma, Vh = torch.linalg.svd(W.double())
    return U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]


def milora(W: torch.Tensor, rank: int) -> torch.Tensor:
    """B·A: the ``rank`` smallest of the min(out, in) components of W."""
    U, sigma, Vh = torch.linalg.svd(W.double())
    last = range(len(sigma) - rank, len(sigma))
    return sum(sigma[i] * torch.outer(U[:, i], Vh[i]) for i in last)


def olora(W: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Q_r and R_r by Gram–Schmidt, signs as they come (R's diagonal positive)."""
    W64 = W.double()
    Q = torch.zeros(len(W), rank, dtype=torch.float64)
    for column in range(rank):
        rest = W64[:, column] - Q[:, :column] @ (Q[:, :column].T @ W64[:, column])
        rest = rest - Q[:, :column] @ (Q[:, :column].T @ rest)  # once more: rounding of the first time
        Q[:, column] = rest / rest.norm()
    return Q, Q.T @ W64


def lora_null(W: torch.Tensor, null: torch.Tensor, rank: int) -> torch.Tensor:
    """B·A: the ``rank`` largest components of W·N·Nᵀ with N = ``null``, (in, k) with orthonormal columns."""
    return pissa(W.double() @ null.double() @ null.double().T, rank)


def bottom(C: torch.Tensor, directions: int) -> torch.Tensor:
    """The last left singular vectors of C, as the paper takes them."""
    return torch.linalg.svd(C.double())[0][:, -directions:]
