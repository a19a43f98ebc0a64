"""Where the message lives, and how vectors get into it and out again.

- ``host``: in host memory. Vectors of a device are staged there by way of pinned buffers (staging.py).
- ``device``: in the memory of the device; its pointer goes to a CUDA-aware MPI (staging.DeviceMessage).

Either way what comes out of the exchange is known on the host: NumPy vectors, which ``near`` copies to the
device again. Tensors and arrays in host memory know nothing of all this.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import config
from ..errors import TransportError, on_rank
from ..kernels import has_float64, loaded_torch
from .staging import device_of, stage_of

__all__ = [
    "changed",
    "chosen",
    "device_of",
    "from_host",
    "known",
    "near",
    "on_device",
    "on_host",
    "to_host",
]

# What MPICH calls a kind of device in MPIX_GPU_query_support, and MPI-4.1 a kind of memory.
_KINDS = {"cuda": 0, "rocm": 2}
_OPEN_MPI_ECHOES_BELOW = (6, 0, 0)  # mpi_memory_alloc_kinds: there, what the program asked for


def chosen(MPI: Any) -> tuple[str, str]:
    """The transport that this rank would use for data on a device, and the reason why.

    The ranks of a group use ``device`` only where all of them would. A wrong yes is a segmentation fault
    inside MPI, so what is not known for sure means host.

    Raises TransportError where MPISYNCBN_TRANSPORT forces one that is not available.
    """
    asked = config.transport()
    if asked == "host":
        return "host", "MPISYNCBN_TRANSPORT=host"
    kind = "rocm" if _is_rocm() else "cuda"
    aware, reason = _is_aware(MPI, kind)
    if asked == "device" and not aware:
        raise TransportError(
            f"MPISYNCBN_TRANSPORT=device asks for messages in device memory, but {_name(MPI)} cannot take "
            f"them{on_rank()}: {reason}. Use an MPI library built for {kind} (docs/transports.md), or set "
            "the variable to auto"
        )
    return "device" if aware else "host", reason


def _is_aware(MPI: Any, kind: str) -> tuple[bool, str]:
    """Whether MPI takes pointers to device memory, and who said so."""
    query = f"MPIX_Query_{kind}_support"
    try:  # its symbols are also those of the MPI library it is linked with
        library: Any = ctypes.CDLL(MPI.__file__)
    except OSError:
        library = None
    if hasattr(library, query):
        aware = getattr(library, query)() == 1
        return aware, f"{query}() says {'yes' if aware else 'no'}"
    if hasattr(library, "MPIX_GPU_query_support"):
        found = ctypes.c_int(0)
        aware = library.MPIX_GPU_query_support(_KINDS[kind], ctypes.byref(found)) == 0 and found.value == 1
        return aware, f"MPIX_GPU_query_support() says {'yes' if aware else 'no'}"
    vendor, version = MPI.get_vendor()
    if vendor != "Open MPI" or version >= _OPEN_MPI_ECHOES_BELOW:
        info = MPI.COMM_WORLD.Get_info()
        kinds = info.Get("mpi_memory_alloc_kinds")
        info.Free()
        if kinds is not None:
            aware = any(each.partition(":")[0] == kind for each in kinds.split(","))
            return aware, f"mpi_memory_alloc_kinds is {kinds!r}"
    variable = config.device_aware(kind)
    if variable is not None:
        return True, f"{variable} is set"
    return False, (
        f"{query}, MPIX_GPU_query_support, mpi_memory_alloc_kinds and the variables of Cray MPICH and "
        "MVAPICH2 were looked for, and none is there"
    )


def _is_rocm() -> bool:
    torch = loaded_torch()
    return torch is not None and torch.version.hip is not None


def _name(MPI: Any) -> str:
    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def on_host(array: Any) -> bool:
    """Whether the values of an array are in host memory."""
    return isinstance(array, np.ndarray) or getattr(array, "is_cpu", False)


def known(number: Any) -> bool:
    """Whether the value of a number, or of an array of no dimensions, can be looked at without waiting."""
    if isinstance(number, (int, float)):  # also one that torch.compile traces: it has no attributes
        return True
    if not hasattr(number, "is_cpu"):
        return on_host(number) or not hasattr(number, "ndim") or isinstance(number, np.generic)
    torch = loaded_torch()
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not number.is_cpu:
        return False  # where shapes alone are computed, there are no values
    return type(number) in (torch.Tensor, torch.nn.Parameter)


def on_device(array: Any) -> bool:
    """Whether its values are in memory whose pointer a CUDA-aware MPI takes."""
    return not on_host(array) and stage_of(array) is not None


def to_host(*vectors: Any) -> Sequence[np.ndarray]:
    """Float64 NumPy vectors with the values of any arrays, all of one kind.

    Those of a device are views of a pinned buffer: use them before the next few calls.
    """
    if isinstance(vectors[0], np.ndarray):
        return vectors
    if on_host(vectors[0]):
        return [vector.detach().double().numpy() for vector in vectors]
    stage = stage_of(vectors[0])
    if stage is not None:
        return stage.to_host(vectors)
    return [vector.detach().to("cpu").double().numpy() for vector in vectors]


def near(x: Any, *vectors: Any) -> Sequence[Any]:
    """The vectors where kernels for ``x`` take them: NumPy ones are copied to its device, if it is on one."""
    if not isinstance(vectors[0], np.ndarray) or on_host(x):
        return vectors
    stage = stage_of(x)
    if stage is not None:
        return stage.to_device(vectors)
    dtype = "float64" if has_float64(x) else "float32"
    return list(loaded_torch().from_numpy(np.stack(vectors).astype(dtype)).to(x.device))


def from_host(values: np.ndarray, like: Any) -> Any:
    """``values`` as the kind of array that ``like`` is, on its device."""
    if isinstance(like, np.ndarray):
        return values
    return loaded_torch().from_numpy(values) if on_host(like) else near(like, values)[0]


def changed(array: Any) -> Any:
    """What tells autograd that native code writes to such arrays, as torch itself tells it; or None."""
    return None if isinstance(array, np.ndarray) else loaded_torch()._C._increment_version
