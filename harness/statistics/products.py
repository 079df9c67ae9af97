"""Sums of products over tokens, cheaply: half of a symmetric matrix, exact products in the model's dtype.

A Gram matrix Σ_t x_t x_tᵀ is kept and added up above its diagonal alone, in row blocks (`UpperTriangle`); the rest is
filled in once, at the end.

The products of two bf16 numbers are exact in fp32. So of bf16 rows the accelerator multiplies bf16 and adds up in fp32;
on the CPU oneDNN does the same when it may treat fp32 operands as bf16 ones, which here they are. (A bf16 matmul would
round each batch's *sum* to bf16.) fp16 is multiplied as fp32 on the CPU.

Measured, one thread of an EPYC with avx512_bf16, d = 2048, 2048 tokens, ms per batch: whole product and addition 176,
upper half in blocks of 256 93; of bf16 rows, oneDNN's bf16 47, bf16 matmul of the whole 41. Frobenius error to float64
of one batch: fp32 2e-7, oneDNN's bf16 7e-7, bf16 matmul 1.7e-3, hence not used.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

CPU_BLOCK, ACCELERATOR_BLOCK = 256, 1024


def add_product(total_LR: torch.Tensor, left_TL: torch.Tensor, right_TR: torch.Tensor) -> None:
    """Add leftᵀ·right to ``total_LR``, in place."""
    _add(total_LR, left_TL.T, right_TR)


class UpperTriangle:
    """A Gram matrix Σ_t x_t x_tᵀ (size, size), fp32, of which only row blocks from the diagonal on are there.

    ``blocks``: block i holds rows from ``starts[i]`` on and the columns from ``starts[i]`` on; of the triangle inside
    the block on the diagonal both halves. All are views of one tensor: many small ones would leave holes in the heap.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        step = _step(device)
        self.starts = range(0, size, step)
        shapes = [(min(step, size - start), size - start) for start in self.starts]
        parts = torch.zeros(self.numbers(size, device), device=device).split(
            [rows * columns for rows, columns in shapes]
        )
        self.blocks = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @staticmethod
    def numbers(size: int, device: torch.device) -> int:
        """How many numbers a triangle of ``size`` takes on ``device``."""
        step = _step(device)
        return sum(min(step, size - start) * (size - start) for start in range(0, size, step))

    def add(self, rows_TD: torch.Tensor) -> None:
        """Add rowsᵀ·rows."""
        for start, block in zip(self.starts, self.blocks, strict=True):
            _add(block, rows_TD[:, start : start + len(block)].T, rows_TD[:, start:])

    def trace(self) -> torch.Tensor:
        """The sum of the diagonal, on the device. A NaN or inf in any row that was added makes it one."""
        return torch.stack([block.diagonal().sum() for block in self.blocks]).sum()

    def whole(self) -> torch.Tensor:
        """The whole matrix, exactly symmetric; the triangle is given up."""
        total_DD = self.blocks[0].new_empty(self.size, self.size)
        for start, block in zip(self.starts, self.blocks, strict=True):
            stop = start + len(block)
            square = block[:, : len(block)].triu()
            total_DD[start:stop, start:stop] = square + square.triu(1).T
            total_DD[start:stop, stop:] = block[:, len(block) :]
            total_DD[stop:, start:stop] = block[:, len(block) :].T
        self.blocks.clear()
        return total_DD


def _step(device: torch.device) -> int:
    return CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK


def _add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left·right, the products added up in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and torch.version.hip is None:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        with _bfloat16_operands() if left.dtype == torch.bfloat16 else nullcontext():
            total.addmm_(left.to(total.dtype), right.to(total.dtype))


@contextmanager
def _bfloat16_operands() -> Iterator[None]:
    """Inside the block oneDNN may take fp32 operands for bf16."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
