"""Quadratic forms Σ ⟨θ − μ, P (θ − μ)⟩ of a model's parameters, with P diagonal or made of Kronecker blocks.

With (Q ⊗ U) vec V = vec(U V Qᵀ) (Sliwa et al., 2025, Appendix C) a Kronecker block A ⊗ G of a weight Δ costs two matrix
products, P Δ = G Δ A. P Δ is both the value, ⟨Δ, P Δ⟩, and half of the gradient, so that it is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Evaluated:
    """The value of a form and its gradient by parameter: ``gradients`` are flat, for parameters one after another."""

    value: torch.Tensor
    parameters: Sequence[nn.Parameter]
    gradients: tuple[torch.Tensor, ...]
    shapes: tuple[torch.Size, ...]

    def differentiable(self) -> torch.Tensor:
        """The value, with its gradient known to autograd."""
        return _Known.apply(self.value, self.gradients, self.shapes, *self.parameters)


class Form(Protocol):
    """A quadratic form of some parameters, which must be whole where it is evaluated."""

    def evaluate(self) -> Evaluated: ...


class DiagonalForm:
    """Σ D ∘ (θ − μ)² over ``parameters``; ``means`` μ and ``precisions`` D have their shapes."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        means: Sequence[torch.Tensor],
        precisions: Sequence[torch.Tensor],
    ) -> None:
        self._parameters = parameters
        self._shapes = tuple(mean.shape for mean in means)
        self._mean = torch.cat([_placed(m, p).flatten() for m, p in zip(means, parameters, strict=True)])
        self._precision = torch.cat([_moved(d, p).flatten() for d, p in zip(precisions, parameters, strict=True)])

    @torch.no_grad()
    def evaluate(self) -> Evaluated:
        """Value and gradient, in fp32 at least."""
        delta = torch.cat([parameter.flatten() for parameter in self._parameters]) - self._mean
        product = self._precision * delta
        return Evaluated(torch.dot(delta, product), self._parameters, (2 * product,), self._shapes)


class KroneckerForm:
    """Σ_n ⟨Δ_n, G_n Δ_n A_n⟩ over n units of one shape, Δ = θ − μ of shape (rows, columns).

    A unit is a weight, or several one below the other: layers that read the same input share A, and their G are the
    blocks of a block-diagonal one.

    Args:
        units: the parameters of each unit; ``means``: their μ, likewise.
        G: (n, rows, rows), symmetric. A: (n, columns, columns), symmetric.
    """

    def __init__(
        self,
        units: Sequence[Sequence[nn.Parameter]],
        means: Sequence[Sequence[torch.Tensor]],
        G: torch.Tensor,
        A: torch.Tensor,
    ) -> None:
        self._parameters = [parameter for unit in units for parameter in unit]
        self._shapes = tuple(mean.shape for unit in means for mean in unit)
        self._mean_NRC = _stacked(self._parameters, [mean for unit in means for mean in unit], len(units))
        self._G_NRR, self._A_NCC = _moved(G, self._parameters[0]), _moved(A, self._parameters[0])

    @torch.no_grad()
    def evaluate(self) -> Evaluated:
        """Value and gradient, in fp32 at least."""
        delta_NRC = torch.cat(list(self._parameters)).view(self._mean_NRC.shape) - self._mean_NRC
        product_NRC = self._G_NRR @ delta_NRC @ self._A_NCC
        value = torch.dot(delta_NRC.flatten(), product_NRC.flatten())
        return Evaluated(value, self._parameters, (2 * product_NRC.flatten(),), self._shapes)


class CrossForm:
    """2 Σ_n ⟨Δ_n, G_n E_n A_nᵀ⟩: the off-diagonal blocks between the As (r, in) and Bs (out, r) of n layers.

    Δ and E are the differences of A and B from their means. G: (n, r, out). A: (n, in, r).
    """

    def __init__(
        self,
        As: Sequence[nn.Parameter],
        Bs: Sequence[nn.Parameter],
        means: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
        G: torch.Tensor,
        A: torch.Tensor,
    ) -> None:
        self._As, self._Bs = list(As), list(Bs)
        self._mean_A, self._mean_B = _stacked(As, means[0], len(As)), _stacked(Bs, means[1], len(Bs))
        self._shapes = tuple(mean.shape for side in means for mean in side)
        self._G_NRO, self._A_NIR = _moved(G, As[0]), _moved(A, As[0])

    @torch.no_grad()
    def evaluate(self) -> Evaluated:
        """Value and gradient, in fp32 at least."""
        delta_NRI = torch.cat(self._As).view(self._mean_A.shape) - self._mean_A
        other_NOR = torch.cat(self._Bs).view(self._mean_B.shape) - self._mean_B
        for_A = self._G_NRO @ other_NOR @ self._A_NIR.mT
        for_B = self._G_NRO.mT @ (delta_NRI @ self._A_NIR)
        value = 2 * torch.dot(delta_NRI.flatten(), for_A.flatten())
        gradients = (2 * for_A.flatten(), 2 * for_B.flatten())
        return Evaluated(value, [*self._As, *self._Bs], gradients, self._shapes)


class _Known(torch.autograd.Function):
    """A value whose gradient was computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        gradients: tuple[torch.Tensor, ...],
        shapes: tuple[torch.Size, ...],
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        ctx.gradients, ctx.shapes = gradients, shapes
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = torch.cat([gradient * outputs[0] for gradient in ctx.gradients])
        parts = flat.split([shape.numel() for shape in ctx.shapes])
        own = [p.view(shape).to(dtype) for p, shape, dtype in zip(parts, ctx.shapes, ctx.dtypes, strict=True)]
        return None, None, None, *own


def _stacked(parameters: Sequence[nn.Parameter], means: Sequence[torch.Tensor], units: int) -> torch.Tensor:
    """The means of ``units`` units, (units, rows, columns)."""
    flat = torch.cat([_placed(mean, parameter) for mean, parameter in zip(means, parameters, strict=True)])
    return flat.view(units, -1, flat.shape[-1])


def _placed(mean: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """μ as the parameter itself holds it: rounded to its dtype, so that θ − μ is exactly zero at step 0."""
    return _moved(mean.to(parameter.dtype), parameter)


def _moved(values: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """On the parameter's device, in fp32 at least."""
    return values.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
