"""Where the message lives, and how vectors get into it and out again.

- ``host``: in host memory. Vectors of a device are staged there by way of pinned buffers (staging.py).
- ``device``: in the memory of the device; its pointer goes to a CUDA-aware MPI (staging.DeviceMessage).

Either way the result of the exchange is on the host: NumPy vectors, which ``to_device_of`` copies
to the device again. For tensors and arrays in host memory nothing of this is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from .. import config
from ..errors import TransportError, on_rank
from ..kernels import Array, has_float64, loaded_torch
from .staging import device_of, staging_for

__all__ = [
    "chosen",
    "device_of",
    "from_host",
    "is_readable_now",
    "on_device",
    "on_host",
    "to_device_of",
    "to_host",
    "version_counter_of",
]

# What MPICH calls a kind of device in MPIX_GPU_query_support, and MPI-4.1 a kind of memory.
_KINDS = {"cuda": 0, "rocm": 2}
_OPEN_MPI_ECHOES_BELOW = (6, 0, 0)  # mpi_memory_alloc_kinds: there, what the program asked for


def chosen(MPI: ModuleType) -> tuple[str, str]:
    """The transport that this rank would use for data on a device, and the reason why.

    The ranks of a group use ``device`` only where all of them would. A wrong yes is a segmentation
    fault inside MPI, so what is not known for sure means host.

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


def _is_aware(MPI: ModuleType, kind: str) -> tuple[bool, str]:
    """Whether MPI takes pointers to device memory, and who said so."""
    for ask in (_ask_library, _ask_for_alloc_kinds):
        answer = ask(MPI, kind)
        if answer is not None:
            return answer
    variable = config.device_aware(kind)
    if variable is not None:
        return True, f"{variable} is set"
    return False, (
        f"MPIX_Query_{kind}_support, MPIX_GPU_query_support, mpi_memory_alloc_kinds and the variables of "
        "Cray MPICH and MVAPICH2 were looked for, and none is there"
    )


def _ask_library(MPI: ModuleType, kind: str) -> tuple[bool, str] | None:
    """What MPI's own functions say; None where there are none."""
    try:  # its symbols are also those of the MPI library it is linked with
        library = ctypes.CDLL(MPI.__file__)
    except OSError:
        return None
    query = f"MPIX_Query_{kind}_support"
    if hasattr(library, query):
        aware = getattr(library, query)() == 1
        return aware, f"{query}() says {'yes' if aware else 'no'}"
    if hasattr(library, "MPIX_GPU_query_support"):
        found = ctypes.c_int(0)
        aware = library.MPIX_GPU_query_support(_KINDS[kind], ctypes.byref(found)) == 0 and found.value == 1
        return aware, f"MPIX_GPU_query_support() says {'yes' if aware else 'no'}"
    return None


def _ask_for_alloc_kinds(MPI: ModuleType, kind: str) -> tuple[bool, str] | None:
    """What the kinds of memory say that MPI supports; None where it tells none."""
    vendor, version = MPI.get_vendor()
    if vendor == "Open MPI" and version < _OPEN_MPI_ECHOES_BELOW:
        return None
    info = MPI.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds")
    info.Free()
    if kinds is None:
        return None
    aware = any(each.partition(":")[0] == kind for each in kinds.split(","))
    return aware, f"mpi_memory_alloc_kinds is {kinds!r}"


def _is_rocm() -> bool:
    """Whether torch is built for ROCm."""
    torch = loaded_torch()
    return torch is not None and torch.version.hip is not None


def _name(MPI: ModuleType) -> str:
    """The vendor and version of the MPI library."""
    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def on_host(array: Array) -> bool:
    """Whether the values of an array are in host memory."""
    return isinstance(array, np.ndarray) or getattr(array, "is_cpu", False)


def is_readable_now(number: Array | float) -> bool:
    """Whether a number, or an array of no dimensions, can be read without waiting."""
    if isinstance(number, (int, float)):  # also one that torch.compile traces: it has no attributes
        return True
    if not hasattr(number, "is_cpu"):
        return on_host(number) or not hasattr(number, "ndim") or isinstance(number, np.generic)
    torch = loaded_torch()
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not number.is_cpu:
        return False  # where shapes alone are computed, there are no values
    return type(number) in (torch.Tensor, torch.nn.Parameter)


def on_device(array: Array) -> bool:
    """Whether the values of an array are in memory whose pointer a CUDA-aware MPI takes."""
    return not on_host(array) and staging_for(array) is not None


def to_host(*vectors: Array) -> Sequence[np.ndarray]:
    """Float64 NumPy vectors with the values of any arrays, all of one kind.

    For arrays on a device they are views of a pinned buffer: use them before the next few calls.
    """
    if isinstance(vectors[0], np.ndarray):
        return vectors
    if on_host(vectors[0]):
        return [vector.detach().double().numpy() for vector in vectors]
    staging = staging_for(vectors[0])
    if staging is not None:
        return staging.to_host(vectors)
    return [vector.detach().to("cpu").double().numpy() for vector in vectors]


def to_device_of(x: Array, *vectors: Array) -> Sequence[Array]:
    """The vectors where kernels for ``x`` take them: on its device, if it is on one."""
    if not isinstance(vectors[0], np.ndarray) or on_host(x):
        return vectors
    staging = staging_for(x)
    if staging is not None:
        return staging.to_device(vectors)
    dtype = "float64" if has_float64(x) else "float32"
    return list(loaded_torch().from_numpy(np.stack(vectors).astype(dtype)).to(x.device))


def from_host(values: np.ndarray, like: Array) -> Array:
    """``values`` as the kind of array that ``like`` is, on its device."""
    if isinstance(like, np.ndarray):
        return values
    return loaded_torch().from_numpy(values) if on_host(like) else to_device_of(like, values)[0]


def version_counter_of(array: Array) -> Callable[[tuple[Array, ...]], object] | None:
    """The function that tells autograd of tensors changed in place; None for NumPy arrays."""
    return None if isinstance(array, np.ndarray) else loaded_torch()._C._increment_version
