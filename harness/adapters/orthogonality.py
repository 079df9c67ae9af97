"""How far the columns of U and the rows of Vᵀ are from orthonormal, and making them so, for all layers together.

Layers of one shape are stacked, so that the work is a few batched products whatever the number of layers.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from harness.adapters.partitioned import gathered, read_trained, write_trained


def orthogonality_errors(left: Sequence[nn.Parameter], right: Sequence[nn.Parameter]) -> torch.Tensor:
    """‖UᵀU − I‖_F of every U (out, r) of ``left`` and ‖VᵀV − I‖_F of every Vᵀ (r, in) of ``right``, (layers · 2,).

    In fp32, from the r×r Gram matrices, differentiable; the gradient of an error of exactly 0 is 0. Their order is that
    of shapes, not of layers. Collective under ZeRO-3.
    """
    with gathered([*left, *right]):
        # Stacking copies: what the backward pass reads must outlive ZeRO-3's partitioning.
        groups = [
            (side, torch.stack(members))
            for side, parameters in (("left", left), ("right", right))
            for members in _by_shape(parameters)
        ]
    errors = []
    for side, stack in groups:
        M = stack.float()
        gram = M.mT @ M if side == "left" else M @ M.mT
        identity = torch.eye(gram.shape[-1], device=gram.device)
        errors.append(torch.linalg.vector_norm(gram - identity, dim=(1, 2)))
    return torch.cat(errors)


@torch.no_grad()
def orthonormalise(left: Sequence[nn.Parameter], right: Sequence[nn.Parameter]) -> None:
    """Gram–Schmidt on the columns of every U and the rows of every Vᵀ: masters and what the forward pass reads.

    By Householder QR with R's diagonal positive, which gives the same vectors. Collective under DeepSpeed.
    """
    for side, parameters in (("left", left), ("right", right)):
        whole = {id(parameter): read_trained(parameter) for parameter in parameters}
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(whole[id(parameter)].shape, []).append(parameter)
        for members in shapes.values():
            stack = torch.stack([whole[id(parameter)] for parameter in members])
            result = gram_schmidt(stack if side == "left" else stack.mT)
            for parameter, value in zip(members, result if side == "left" else result.mT, strict=True):
                write_trained(parameter, value.contiguous())


def gram_schmidt(M: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span what the first k columns of ``M`` (…, d, r) span, for every k; same shape."""
    Q, R = torch.linalg.qr(M)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)


def _by_shape(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    return list(shapes.values())
