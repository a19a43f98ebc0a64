"""The four kernels for CuPy arrays, by the kernels for torch tensors.

They work on tensors in the same memory, and on CuPy's current stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cupy
import torch

from . import cuda_kernels_for
from .activation import NO_ACTIVATION, Activation, ActivationContext
from .protocol import Array, Kernels

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]


def local_moments(x: Array) -> tuple[int, Array, Array]:
    with _stream_of(x):
        count, *found = _kernels(x).local_moments(_tensor(x))
        return count, *map(cupy.from_dlpack, found)


def normalize(
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array,
    bias: Array,
    residual: Array = None,
    activation: Activation = NO_ACTIVATION,
) -> Array:
    with _stream_of(x):
        vectors = _tensor(mean), _tensor(invstd), _tensor(weight), _tensor(bias)
        y = _kernels(x).normalize(_tensor(x), *vectors, _tensor(residual), activation)
        return cupy.from_dlpack(y)


def backward_reduce(
    dy: Array, x: Array, mean: Array, invstd: Array, context: ActivationContext | None = None
) -> tuple[Array, Array, Array]:
    with _stream_of(x):
        tensors = _tensor(dy), _tensor(x), _tensor(mean), _tensor(invstd)
        found = _kernels(x).backward_reduce(*tensors, _context_of(context))
        return tuple(map(cupy.from_dlpack, found))


def backward_elementwise(
    dz: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array,
    mean_dy: Array,
    mean_dy_xmu: Array,
    context: ActivationContext | None = None,
) -> Array:
    with _stream_of(x):
        vectors = _tensor(mean), _tensor(invstd), _tensor(weight), _tensor(mean_dy), _tensor(mean_dy_xmu)
        dx = _kernels(x).backward_elementwise(_tensor(dz), _tensor(x), *vectors, _context_of(context))
        return cupy.from_dlpack(dx)


def _kernels(x: Array) -> Kernels:
    return cuda_kernels_for(torch.device("cuda", x.device.id))[0]


def _tensor(array: Array) -> Array:
    if array is None:
        return None
    if min(array.strides, default=0) < 0:  # torch has no negative strides, and ends the process
        array = cupy.ascontiguousarray(array)
    try:
        return torch.from_dlpack(array)
    except RuntimeError:  # managed memory: pytorch#96318
        return torch.as_tensor(array)


def _context_of(context: ActivationContext | None) -> ActivationContext | None:
    """A context of arrays as a context of tensors."""
    if context is None:
        return None
    activation, *arrays = context
    return ActivationContext(activation, *map(_tensor, arrays))


@contextmanager
def _stream_of(x: Array) -> Iterator[None]:
    with x.device:
        pointer = cupy.cuda.get_current_stream().ptr
    with torch.cuda.device(x.device.id):
        ours = torch.cuda.ExternalStream(pointer) if pointer else torch.cuda.default_stream()
        with torch.cuda.stream(ours), torch.no_grad():
            yield
