"""Addresses and handles of the MPI library that mpi4py is linked with, for native code."""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import TYPE_CHECKING

from . import native

if TYPE_CHECKING:
    from mpi4py import MPI as mpi4py_MPI

    from .cpu._cpu import Link, StreamWorker

__all__ = ["CUDA_DRIVER", "addresses", "handle", "native_link", "native_stream_worker"]

CUDA_DRIVER = "libcuda.so.1"
_MASK_64 = (1 << 64) - 1


def native_link(comm: mpi4py_MPI.Intracomm, MPI: ModuleType) -> Link | None:
    """A Link, which packs, sends and merges a message in one call; None if it cannot be made.

    It calls the MPI_Allreduce of the library that mpi4py is linked with, not that of another one
    that may have been loaded since. The error handler of ``comm`` must be MPI.ERRORS_RETURN.
    """
    kernels = native()
    if kernels is None:
        return None
    try:
        (address,) = addresses(MPI, "MPI_Allreduce")
    except (AttributeError, OSError):
        return None
    return kernels.Link(address, *_handles(comm, MPI), comm.Get_size())


def native_stream_worker(comm: mpi4py_MPI.Intracomm, MPI: ModuleType) -> StreamWorker:
    """A worker for exchanges in the order of a device's streams. transport.py says when."""
    kernels = native()
    if kernels is None:
        raise RuntimeError("the native code was not built")
    reduce, gather = addresses(MPI, "MPI_Allreduce", "MPI_Allgather")
    ranks = comm.Get_size(), comm.Get_rank()
    return kernels.StreamWorker(CUDA_DRIVER, reduce, gather, *_handles(comm, MPI), *ranks)


def _handles(comm: mpi4py_MPI.Intracomm, MPI: ModuleType) -> tuple[int, int, int, int, bool]:
    """Handles for a float64 sum over ``comm``, MPI_IN_PLACE, and whether MPI's handles are ints."""
    handles = [handle(MPI, each) for each in (comm, MPI.DOUBLE, MPI.SUM)]
    return *handles, int(MPI.IN_PLACE), MPI._sizeof(comm) == 4


def addresses(MPI: ModuleType, *names: str) -> list[int]:
    """The addresses of functions of the library that mpi4py is linked with.

    Raises AttributeError or OSError if one is missing.
    """
    library = ctypes.CDLL(MPI.__file__)
    functions = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in names]
    return [function.value or 0 for function in functions]


def handle(MPI: ModuleType, thing: mpi4py_MPI.Comm | mpi4py_MPI.Datatype | mpi4py_MPI.Op) -> int:
    """MPI's handle for an object of mpi4py, as a number for native code."""
    return MPI._handleof(thing) & _MASK_64
