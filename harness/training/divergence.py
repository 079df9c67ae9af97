"""KL divergence from a reference distribution over tokens, in chunks: memory is bounded by a chunk, not a batch.

A vocabulary has 10⁵ tokens, so one fp32 copy of a batch's logits can be larger than the model. `summed_divergence`
looks at ``CHUNK`` logits at a time and computes value and gradient together in the forward pass; all that it keeps is
the gradient itself, in the dtype of the logits, which the backward pass needs anyway.

A reference is either the original model's logits (`Logits`) or, computed once and kept, its most probable tokens and
the mass of all others (`TopK`). With the mass of the others as one bucket the divergence is that of the distributions
coarsened to k + 1 outcomes: never more than the full one (data processing inequality), and equal to it for k = V.

Both distributions are taken at a temperature T, softmax(logits / T); values are not multiplied by T² here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

CHUNK = 2**22  # logits looked at together: 16 MiB in fp32, of which a few are alive at a time


class Reference(Protocol):
    """The distributions at N positions that others are measured against."""

    def divergence(self, part: slice, log_q: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """KL(p ‖ q) at the positions of ``part`` from log q (positions, vocabulary), and what `gradient` reuses."""
        ...

    def gradient(self, part: slice, log_q: torch.Tensor, kept: Any) -> torch.Tensor:
        """Its derivative by the logits that ``log_q`` is the log-softmax of; may overwrite ``log_q``."""
        ...


@dataclass(frozen=True)
class Logits:
    """A model's own logits: ``logits`` (M, vocabulary), of which rows ``places`` (N) are meant; temperature T."""

    logits: torch.Tensor
    places: torch.Tensor
    temperature: float = 1.0

    def divergence(self, part: slice, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = _log_softmax(self.logits[self.places[part]], self.temperature)
        p = log_p.exp()
        return (p * log_p.sub_(log_q)).sum(-1), p

    def gradient(self, part: slice, log_q: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return log_q.exp_().sub_(kept)


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens at N positions, and the mass of all others.

    Attributes:
        indices: (N, k) tokens.
        log_probabilities: (N, k), natural logarithms.
        log_tail: (N), logarithm of the mass of the others; -inf where there are none.
    """

    indices: torch.Tensor
    log_probabilities: torch.Tensor
    log_tail: torch.Tensor

    def divergence(self, part: slice, log_q: torch.Tensor) -> tuple[torch.Tensor, Any]:
        indices = self.indices[part].long()
        log_p = self.log_probabilities[part].to(log_q.dtype)
        p = log_p.exp()
        value = (p * (log_p - log_q.gather(-1, indices))).sum(-1)
        if indices.shape[-1] == log_q.shape[-1]:
            return value, (indices, p, None)
        log_tail = self.log_tail[part].to(log_q.dtype)
        # Summed over the others, not 1 - Σ: what is left of 1 after subtracting it would be rounding alone.
        log_q_tail = log_q.scatter(-1, indices, -torch.inf).logsumexp(-1)
        there = log_tail > -torch.inf
        value = value + torch.where(there, log_tail.exp() * (log_tail - log_q_tail), torch.zeros_like(value))
        return value, (indices, p, torch.where(there, log_tail - log_q_tail, log_tail))

    def gradient(self, part: slice, log_q: torch.Tensor, kept: Any) -> torch.Tensor:
        indices, p, log_ratio = kept
        mass = p.sum(-1, keepdim=True)
        if log_ratio is None:
            q = log_q.exp_()
            return q.mul_(mass).scatter_add_(-1, indices, -p)
        mass = mass + self.log_tail[part].to(log_q.dtype).exp()[:, None]
        # q·m everywhere, minus p on the k tokens and p_tail·q/q_tail on the others; q/q_tail by exponents, as q_tail
        # may be smaller than the smallest number there is.
        ours = log_q.gather(-1, indices).exp() * mass - p
        others = (log_q + log_ratio[:, None]).exp_()
        return log_q.exp_().mul_(mass).sub_(others).scatter_(-1, indices, ours)


def summed_divergence(
    logits: torch.Tensor, places: torch.Tensor, reference: Reference, temperature: float = 1.0
) -> torch.Tensor:
    """Σ KL(p ‖ softmax(logits / T)) over ``places``, a scalar in fp32 (fp64 for fp64 logits).

    Differentiable once, by ``logits`` alone. Temporary memory is a few times ``CHUNK`` numbers, and the gradient.

    Args:
        logits: (…, vocabulary), in any floating dtype; seen as (M, vocabulary).
        places: (N) rows of that view, each at most once.
        reference: the distributions p at these N positions, at the same temperature.
    """
    return _SummedDivergence.apply(logits, places, reference, temperature)


def token_divergence(original: torch.Tensor, adapted: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(softmax(original / T) ‖ softmax(adapted / T)) at every position: (…) from (…, vocabulary); no gradient."""
    flat = adapted.detach().reshape(-1, adapted.shape[-1])
    places = torch.arange(len(flat), device=flat.device)
    reference = Logits(original.detach().reshape(-1, original.shape[-1]), places, temperature)
    values = [reference.divergence(part, log_q)[0] for part, log_q in _chunks(flat, places, temperature)]
    return torch.cat(values).view(adapted.shape[:-1])


@torch.no_grad()
def top_k(logits: torch.Tensor, places: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
    """What `TopK` holds, of softmax(logits / T) at rows ``places`` (N) of ``logits`` (M, vocabulary).

    Kept in fp32 with 32-bit indices; ``k`` is at most the size of the vocabulary.
    """
    k = min(k, logits.shape[-1])
    found = []
    for _, log_p in _chunks(logits, places, temperature):
        values, indices = log_p.topk(k, dim=-1)
        tail = log_p.scatter(-1, indices, -torch.inf).logsumexp(-1)
        found.append((indices.int(), values.float(), tail.float()))
    return TopK(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class _SummedDivergence(torch.autograd.Function):
    """Value and gradient in one go over the chunks; the backward pass only scales the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, places: torch.Tensor, reference: Reference, temperature: float
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        flat = logits.reshape(-1, logits.shape[-1])
        gradient = torch.zeros_like(flat) if wanted else None
        values = []
        for part, log_q in _chunks(flat, places, temperature):
            value, kept = reference.divergence(part, log_q)
            values.append(value)
            if gradient is not None:
                # By logits / T so far; by the logits it is 1/T of it.
                own = reference.gradient(part, log_q, kept)
                gradient[places[part]] = own.div_(temperature).to(gradient.dtype)
        ctx.gradient = None if gradient is None else gradient.view(logits.shape)
        return torch.cat(values).sum() if values else flat.new_zeros((), dtype=_exact(flat.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of a divergence is given out once")
        return gradient.mul_(grad_output), None, None, None


def _chunks(flat: torch.Tensor, places: torch.Tensor, temperature: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Parts of ``places`` and the log-softmax of ``flat / T`` there, at most ``CHUNK`` numbers at a time."""
    size = max(1, CHUNK // flat.shape[-1])
    for start in range(0, len(places), size):
        part = slice(start, start + size)
        yield part, _log_softmax(flat[places[part]], temperature)


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    exact = logits.to(_exact(logits.dtype))
    return (exact if temperature == 1.0 else exact / temperature).log_softmax(-1)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
