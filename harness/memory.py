"""Making memory that is freed free for others, too."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in glibc's malloc.h
_LARGE, _USUAL = 2**20, 32 * 2**20  # bytes; glibc's own threshold moves up to the latter by itself


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside the block tensors of 1 MiB or more are the system's again as soon as they are freed, on a CPU with glibc.

    Without it glibc keeps freed blocks of up to 32 MiB and, where large and small ones alternate and several threads
    free them, ever more of them: collecting statistics block by block then grew by half from 4 to 16 blocks while what
    was alive stayed the same. It costs fresh pages for every such tensor (about a tenth of the time there). What was
    freed before the block began is used first; `trim` gives that back. Where glibc's own variable sets the threshold,
    that stands.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or (mallopt := _libc("mallopt")) is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    trim()
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _USUAL)


def trim() -> None:
    """Give freed pages in the midst of the heap back to the system; about a millisecond, nothing without glibc."""
    if (malloc_trim := _libc("malloc_trim")) is not None:
        malloc_trim(0)


def _libc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
