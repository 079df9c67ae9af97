"""LAPACK's solver for a range of eigenvalues, called so that other threads go on meanwhile.

`scipy.linalg.eigh` keeps Python's global lock while it computes: a second thread with a layer of its own would stand
still. scipy exports the same routine for compiled callers; called through ctypes it releases the lock.
"""

import ctypes
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController


def symmetric_subset(G: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues number ``first`` to ``last`` (from 0, ascending) of a symmetric G (n, n) and their vectors (n, k).

    LAPACK's ``dsyevr``; G is float64, finite, and on the CPU.

    Raises:
        RuntimeError: LAPACK did not converge.
    """
    n, k = len(G), last - first + 1
    matrix = G.clone(memory_format=torch.contiguous_format)  # overwritten; symmetric, so its layout does not matter
    values, vectors = G.new_empty(n), G.new_empty(k, n)  # LAPACK's columns are torch's rows
    support = torch.empty(2 * n, dtype=torch.int32)
    found, info = ctypes.c_int(), ctypes.c_int()

    def call(work: torch.Tensor, size: int, integers: torch.Tensor, integers_size: int) -> None:
        _dsyevr()(
            b"V",
            b"I",
            b"L",
            _integer(n),
            matrix.data_ptr(),
            _integer(n),
            _real(0.0),  # the bounds of a range by value, which is not asked for
            _real(0.0),
            _integer(first + 1),
            _integer(last + 1),
            _real(0.0),  # LAPACK's own tolerance
            ctypes.byref(found),
            values.data_ptr(),
            vectors.data_ptr(),
            _integer(n),
            support.data_ptr(),
            work.data_ptr(),
            _integer(size),
            integers.data_ptr(),
            _integer(integers_size),
            ctypes.byref(info),
        )

    work, integers = G.new_empty(1), torch.empty(1, dtype=torch.int32)
    call(work, -1, integers, -1)  # asks for the sizes of the work space
    work, integers = G.new_empty(int(work[0])), torch.empty(int(integers[0]), dtype=torch.int32)
    with _one_blas_thread:
        call(work, len(work), integers, len(integers))
    if info.value != 0 or found.value != k:
        raise RuntimeError(f"dsyevr: info {info.value}, {found.value} of {k} eigenvalues")
    return values[:k].clone(), vectors.T


@cache
def _dsyevr() -> Callable[..., None]:
    from scipy.linalg import cython_lapack

    capsule = cython_lapack.__pyx_capi__["dsyevr"]
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 21)(pointer(capsule, name(capsule)))


def _integer(value: int) -> "ctypes._CArgObject":
    return ctypes.byref(ctypes.c_int(value))


def _real(value: float) -> "ctypes._CArgObject":
    return ctypes.byref(ctypes.c_double(value))


class _OneBlasThread:
    """scipy's BLAS on one thread while anyone is inside: several get in the way of torch's, which wait spinning.

    For n = 1024 on two cores 98 ms with one thread, 203 with two, and seconds where other work runs. The number is
    the process's, so the first to come sets it and the last to go gives it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._outer = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._outer.enter_context(_blas().limit(limits=1, user_api="blas"))
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._outer.close()


_one_blas_thread = _OneBlasThread()


@cache
def _blas() -> "ThreadpoolController":
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
