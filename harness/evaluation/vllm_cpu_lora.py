"""LoRA products for vLLM on the CPU: one matrix product for all tokens of an adapter.

vLLM 0.32's own CPU implementation copies the adapter's A and B once for every token of a step before it multiplies
(``lora_b_weights[lora_indices_tensor]``), which made a model with an adapter of rank 32 fourteen times slower than its
base. Tokens of one adapter stand together, so slices of the step multiply the same matrices: nothing is copied. It also
cannot score a prompt's tokens (``prompt_logprobs``) with an adapter in place; here it can.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class SegmentedPunicaCPU(PunicaWrapperCPU):
    """vLLM's LoRA wrapper with its matrix products replaced; tokens without an adapter are left alone."""

    def _apply_shrink(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        """y[tokens, rank] = scale · x[tokens, in] Aᵀ; a segment's A is w_t_all[slot, 0], [rank, in]."""
        for rows, slot in self._segments():
            y[rows] = scale * (x[rows].to(y.dtype) @ w_t_all[slot, 0].to(y.dtype).T)

    def _apply_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        """y[tokens, slice] += x[tokens, rank] Bᵀ; a segment's B is w_t_all[slot, 0], [slice, rank]."""
        for rows, slot in self._segments():
            product = x[rows].to(y.dtype) @ w_t_all[slot, 0].to(y.dtype).T
            part = y[rows, y_offset : y_offset + y_slice_size]
            if add_inputs:
                part += product
            else:
                part.copy_(product)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y[rows, vocabulary] += scale · x[rows, hidden] Aᵀ Bᵀ for the adapter of all requests of the step.

        Rows are requests, or all positions of one prompt whose tokens are scored; the base class takes only the former.
        """
        slots = self.sampler_indices.unique().tolist()
        if len(slots) != 1:
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)
        elif slots[0] >= 0:
            A, B = lora_a_stacked[slots[0], 0], lora_b_stacked[slots[0], 0]
            shrunk = scale * (x.view(-1, x.shape[-1]).float() @ A.float().T)
            y.view(-1, y.shape[-1])[:, : B.shape[0]] += shrunk.to(y.dtype) @ B.to(y.dtype).T

    def _segments(self) -> Iterator[tuple[slice, int]]:
        """Consecutive tokens that use one adapter, and the slot that holds it; -1 stands for none."""
        starts, lengths, slots, *_ = self.prefill_metadata
        for start, length, slot in zip(starts.tolist(), lengths.tolist(), slots.tolist(), strict=True):
            if slot >= 0:
                yield slice(start, start + length), slot


@contextmanager
def segmented_lora() -> Iterator[None]:
    """An engine that is built inside uses `SegmentedPunicaCPU`."""
    current_platform.get_punica_wrapper = lambda: f"{__name__}.{SegmentedPunicaCPU.__name__}"
    try:
        yield
    finally:
        del current_platform.get_punica_wrapper  # the class's own method is visible again
