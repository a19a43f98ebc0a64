"""Where the message buffer lives, and how vectors get into it and out again.

Only ``host`` exists so far: the message is a NumPy buffer in host memory, and vectors that live
on a device are copied there and back. The copy to the host waits for the device's current stream.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from . import config
from .errors import TransportError, on_rank
from .kernels import loaded_torch, native

__all__ = ["blend", "chosen", "direct", "from_host", "near", "to_host"]


def chosen() -> tuple[str, str]:
    """The transport in use and the reason why.

    Raises TransportError where MPISYNCBN_TRANSPORT forces one that is not available.
    """
    asked = config.transport()
    if asked == "device":
        raise TransportError(
            "MPISYNCBN_TRANSPORT=device asks for messages in device memory through a CUDA-aware MPI, which "
            f"this version does not have{on_rank()}: unset it, or set it to host or auto"
        )
    return "host", "MPISYNCBN_TRANSPORT=host" if asked == "host" else "the only transport of this version"


def direct(comm: Any, MPI: Any) -> Any:
    """Native code that packs, sends and merges the message in one call; None where there is none.

    It calls the MPI_Allreduce of the library that mpi4py is linked with, and no other that may have been
    loaded since. ``comm`` must return error codes.
    """
    kernels = native()
    if kernels is None:
        return None
    try:
        function = ctypes.CDLL(MPI.__file__).MPI_Allreduce
    except (AttributeError, OSError):
        return None
    address = ctypes.cast(function, ctypes.c_void_p).value
    handles = [MPI._handleof(each) & _WORD for each in (comm, MPI.DOUBLE, MPI.SUM)]
    return kernels.Link(address, *handles, int(MPI.IN_PLACE), MPI._sizeof(comm) == 4, comm.Get_size())


_WORD = (1 << 64) - 1


def to_host(vector: Any) -> np.ndarray:
    """A float64 NumPy vector with the values of any array."""
    if isinstance(vector, np.ndarray):
        return vector
    if hasattr(vector, "detach"):  # torch
        return vector.detach().to("cpu").double().numpy()
    return vector.get()  # CuPy


def from_host(values: np.ndarray, like: Any) -> Any:
    """``values`` as the kind of array that ``like`` is, on its device."""
    if isinstance(like, np.ndarray):
        return values
    if hasattr(like, "detach"):
        return loaded_torch().from_numpy(values).to(like.device)
    import cupy

    return cupy.asarray(values)


def near(vector: Any, x: Any) -> Any:
    """``vector`` as the kernels for ``x`` want it: NumPy for data in host memory, else on its device."""
    host_memory = getattr(getattr(x, "device", "cpu"), "type", "cpu") == "cpu" and not hasattr(x, "get")
    return to_host(vector) if host_memory else vector


def changed(*arrays: Any) -> None:
    """Tell autograd that native code wrote to these, as it knows of operations of torch."""
    if not isinstance(arrays[0], np.ndarray):
        loaded_torch()._C._increment_version(arrays)


def blend(running: Any, batch: np.ndarray, momentum: Any) -> None:
    """``running = (1 - momentum) * running + momentum * batch`` in place."""
    if not hasattr(running, "lerp_"):  # NumPy, CuPy
        running += momentum * (from_host(batch, running) - running)
        return
    # half precision is rounded once, after the sum
    wide = running if running.dtype.itemsize >= 4 else running.double()
    new = loaded_torch().from_numpy(batch.astype(np.float32) if wide.dtype.itemsize == 4 else batch)
    new = new if wide.is_cpu else new.to(wide.device)
    wide.lerp_(new, momentum.to(wide.dtype) if hasattr(momentum, "ndim") else momentum)
    if wide is not running:
        running.copy_(wide)
