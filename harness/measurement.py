"""Time and peak memory of a phase of work, for the line that a stage ends with."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from harness.console import in_words

_open_peaks: list[int] = []  # bytes, of the blocks of `measured` that are open, the innermost last


@dataclass
class Phase:
    """``seconds`` of wall-clock time; ``peak_bytes`` that this process held at most, above what it held before."""

    seconds: float = 0.0
    peak_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, at most {in_words(self.peak_bytes)} of memory more than before"


@contextmanager
def measured() -> Iterator[Phase]:
    """Fill in the yielded phase when the block ends.

    Memory is the accelerator's where there is one, else resident memory, files that are mapped among it. Linux lets the
    peak of that start anew with the block; elsewhere it is that of the process so far. Blocks may lie in each other:
    the outer one's peak is at least the inner one's.
    """
    phase = Phase()
    accelerator = torch.cuda.is_available()

    def note_peak() -> None:
        """For the blocks that are open: the peak since it was last reset."""
        peak = torch.cuda.max_memory_allocated() if accelerator else resident_peak()
        for number, so_far in enumerate(_open_peaks):
            _open_peaks[number] = max(so_far, peak)

    note_peak()
    before = torch.cuda.memory_allocated() if accelerator else psutil.Process().memory_info().rss
    if accelerator:
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        with suppress(OSError):  # a container may forbid it: the peak is then the process's so far
            clear.write_text("5")
    _open_peaks.append(0)
    began = time.perf_counter()
    try:
        yield phase
    finally:
        phase.seconds = time.perf_counter() - began
        note_peak()
        phase.peak_bytes = max(0, _open_peaks.pop() - before)


def resident_peak() -> int:
    """The largest resident set of this process, bytes, since it was last reset."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def available_memory(device: torch.device) -> int:
    """Bytes free on ``device``: of the accelerator, or of this machine, swap left out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
