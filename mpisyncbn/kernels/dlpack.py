"""The four verbs for CuPy arrays where torch is installed: by its kernels, as tensors in the same memory and
on the stream that is CuPy's current one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import torch

from . import Gate, on_cuda

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]


def local_moments(x: Any) -> tuple[int, Any, Any]:
    with _stream_of(x):
        count, *found = _kernels(x).local_moments(_tensor(x))
        return count, *map(cupy.from_dlpack, found)


def normalize(
    x: Any, mean: Any, invstd: Any, weight: Any, bias: Any, residual: Any = None, relu: bool = False
) -> Any:
    with _stream_of(x):
        tensors = map(_tensor, (x, mean, invstd, weight, bias, residual))
        return cupy.from_dlpack(_kernels(x).normalize(*tensors, relu))


def backward_reduce(dy: Any, x: Any, mean: Any, invstd: Any, gate: Any = None) -> tuple[Any, Any, Any]:
    with _stream_of(x):
        tensors = map(_tensor, (dy, x, mean, invstd))
        found = _kernels(x).backward_reduce(*tensors, _tensors(gate))
        return tuple(map(cupy.from_dlpack, found))


def backward_elementwise(
    dz: Any, x: Any, mean: Any, invstd: Any, weight: Any, mean_dy: Any, mean_dy_xmu: Any, gate: Any = None
) -> Any:
    with _stream_of(x):
        tensors = map(_tensor, (dz, x, mean, invstd, weight, mean_dy, mean_dy_xmu))
        return cupy.from_dlpack(_kernels(x).backward_elementwise(*tensors, _tensors(gate)))


def _kernels(x: Any) -> Any:
    return on_cuda(torch.device("cuda", x.device.id))[0]


def _tensor(array: Any) -> Any:
    if array is None:
        return None
    if min(array.strides, default=0) < 0:  # torch has no such, and ends the process
        array = cupy.ascontiguousarray(array)
    try:
        return torch.from_dlpack(array)
    except RuntimeError:  # managed memory: pytorch#96318
        return torch.as_tensor(array)


def _tensors(gate: Gate | None) -> Gate | None:
    return None if gate is None else Gate(*map(_tensor, gate))


@contextmanager
def _stream_of(x: Any) -> Iterator[None]:
    with x.device:
        pointer = cupy.cuda.get_current_stream().ptr
    with torch.cuda.device(x.device.id):
        ours = torch.cuda.ExternalStream(pointer) if pointer else torch.cuda.default_stream()
        with torch.cuda.stream(ours), torch.no_grad():
            yield
