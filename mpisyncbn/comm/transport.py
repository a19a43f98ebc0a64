"""The memory of messages for data on a device, and how vectors get into a message and out again.

- ``host``: the message is in host memory. Vectors are copied there through pinned buffers
  (staging.py).
- ``device``: the message is in the device's memory, and its pointer goes to a CUDA-aware MPI
  (staging.DeviceMessage).
- ``stream``: enqueue.py, which this module only chooses.

With the first two, the result of the exchange is on the host, as NumPy vectors, and
``to_device_of`` copies it to the device. Tensors and arrays in host memory need none of them.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from .. import config
from ..errors import TransportError, on_rank
from ..kernels import Array, has_float64, loaded_torch, native
from ..kernels.link import native_stream_worker
from .launcher import library_name
from .staging import device_of, staging_for

__all__ = [
    "chosen",
    "device_of",
    "from_host",
    "has_device_pointer",
    "is_readable_now",
    "on_host",
    "to_device_of",
    "to_host",
    "version_counter_of",
]

# MPICH's numbers for MPIX_GPU_query_support, by the names that MPI-4.1 has for kinds of memory.
_KINDS = {"cuda": 0, "rocm": 2}
_OPEN_MPI_ECHOES_BELOW = (6, 0, 0)  # their mpi_memory_alloc_kinds only repeats the program's request


def chosen(MPI: ModuleType) -> tuple[str, str]:
    """The transport that this rank would use for data on a device, and the reason.

    A group uses ``device`` only if all its ranks would. If MPI does not take pointers to device
    memory, it dies of a segmentation fault, so this returns ``host`` unless MPI says that it does.

    Raises TransportError if MPISYNCBN_TRANSPORT asks for ``device`` and that is not available.
    """
    asked = config.transport()
    if asked == "host":
        return "host", "MPISYNCBN_TRANSPORT=host"
    if asked == "stream":
        return _stream(MPI)
    kind = "rocm" if _is_rocm() else "cuda"
    aware, reason = _is_aware(MPI, kind)
    if asked == "device" and not aware:
        raise TransportError(
            f"MPISYNCBN_TRANSPORT=device asks for messages in device memory, but {library_name(MPI)} "
            f"cannot take them{on_rank()}: {reason}. Use an MPI library built for {kind}, or set the "
            "variable to auto"
        )
    return "device" if aware else "host", reason


def _stream(MPI: ModuleType) -> tuple[str, str]:
    """Return ``stream`` and the reason, or ``host`` if CUDA's driver or the device cannot serve it.

    Raises TransportError if MPI's thread level is too low, or the native code was not built.
    """
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise TransportError(
            f"MPISYNCBN_TRANSPORT=stream calls MPI from a thread of its own, but MPI provides thread level "
            f"{MPI.Query_thread()}{on_rank()}: ask for MPI.THREAD_MULTIPLE with mpi4py.rc.thread_level or "
            "MPI.Init_thread, or set the variable to auto"
        )
    if native() is None:
        raise TransportError(
            f"MPISYNCBN_TRANSPORT=stream needs the native code, which was not built{on_rank()}: install "
            "mpisyncbn with a C++17 compiler, or set the variable to auto"
        )
    try:
        worker = native_stream_worker(MPI.COMM_SELF, MPI)
    except (AttributeError, OSError, RuntimeError) as error:
        return "host", f"MPISYNCBN_TRANSPORT=stream, but CUDA's driver cannot be used here: {error}"
    torch = loaded_torch()
    device = torch.cuda.current_device() if torch is not None and torch.cuda.is_available() else 0
    if not worker.has_memory_operations(device):
        reason = "MPISYNCBN_TRANSPORT=stream, but the device has no stream memory operations"
        warnings.warn(f"{reason}{on_rank()}: messages go by the host transport", RuntimeWarning, stacklevel=2)
        return "host", reason
    return "stream", "MPISYNCBN_TRANSPORT=stream"


def _is_aware(MPI: ModuleType, kind: str) -> tuple[bool, str]:
    """Whether MPI takes pointers to device memory, and the source that says so, in words."""
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
    """The answer of MPI's own functions, as for ``_is_aware``; None if MPI has no such function."""
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
    """The answer by mpi_memory_alloc_kinds, as for ``_is_aware``; None if MPI does not set it."""
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


def on_host(array: Array) -> bool:
    """Whether the values of an array are in host memory."""
    return isinstance(array, np.ndarray) or getattr(array, "is_cpu", False)


def is_readable_now(number: Array | float) -> bool:
    """Whether a number, or a 0-d array, can be read without waiting."""
    if isinstance(number, (int, float)):  # or one that torch.compile traces, without attributes
        return True
    if not hasattr(number, "is_cpu"):
        return on_host(number) or not hasattr(number, "ndim") or isinstance(number, np.generic)
    torch = loaded_torch()
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not number.is_cpu:
        return False  # tracers and fake tensors have shapes, but no values
    return type(number) in (torch.Tensor, torch.nn.Parameter)


def has_device_pointer(array: Array) -> bool:
    """Whether the values of an array are in memory whose pointer a CUDA-aware MPI takes."""
    return not on_host(array) and staging_for(array) is not None


def to_host(*vectors: Array) -> Sequence[np.ndarray]:
    """Return float64 NumPy vectors with the values of ``vectors``, arrays of one kind.

    For arrays on a device these are views of a pinned buffer, which one of the next calls
    overwrites.
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
    """Return the vectors as the kernels for ``x`` take them: on its device, if it is on one."""
    if not isinstance(vectors[0], np.ndarray) or on_host(x):
        return vectors
    staging = staging_for(x)
    if staging is not None:
        return staging.to_device(vectors)
    dtype = "float64" if has_float64(x) else "float32"
    return list(loaded_torch().from_numpy(np.stack(vectors).astype(dtype)).to(x.device))


def from_host(values: np.ndarray, like: Array) -> Array:
    """Return ``values`` as an array of the kind of ``like``, on its device."""
    if isinstance(like, np.ndarray):
        return values
    return loaded_torch().from_numpy(values) if on_host(like) else to_device_of(like, values)[0]


def version_counter_of(array: Array) -> Callable[[tuple[Array, ...]], object] | None:
    """The function that tells autograd of tensors changed in place; None for NumPy arrays."""
    return None if isinstance(array, np.ndarray) else loaded_torch()._C._increment_version
