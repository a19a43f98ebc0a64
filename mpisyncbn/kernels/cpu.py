"""The four verbs for NumPy arrays and torch tensors in host memory, by native code: cpu.cpp.

Importing this fails where the extension was not built; then aten.py and generic.py serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import MPISyncBNError, on_rank
from . import _cpu, extremes, loaded_torch
from ._cpu import (
    Link,
    about_to_leave,
    fits,
    instruction_set,
    invstd,
    leave_in_finalize,
    most_dimensions,
    threads,
    update_running_stats,
)

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]
# Not verbs, but native as well: what comes before, between and after them, see cpu_link.h and cpu_leave.h.
__all__ += ["Link", "about_to_leave", "fits", "invstd", "leave_in_finalize", "update_running_stats"]
__all__ += ["instruction_set", "most_dimensions", "threads"]

_REFUSED = -1


def local_moments(x: Any) -> tuple[int, np.ndarray, np.ndarray]:
    found = np.empty((3, x.shape[1]))
    count = _cpu.local_moments(x, found, _threads(x))
    if count == _REFUSED:
        count = _cpu.local_moments(_dense(x), found, _threads(x))
    if count == _REFUSED:
        raise _refused(x)
    if count < 0:
        count = -2 - count
        extremes.local_moments(local_moments, x, count, found[0], found[2])
    return count, found[:2] if x.dtype.itemsize == 8 else found[0], found[2]


def normalize(
    x: Any, mean: Any, invstd: Any, weight: Any, bias: Any, residual: Any = None, relu: bool = False
) -> Any:
    for near, vectors, like in _attempts(x, (mean, invstd, weight, bias), residual):
        y = _empty_like(near)
        if done := _cpu.normalize(near, *vectors, *like, y, relu, _threads(x)):
            given = mean, invstd, weight, bias
            return y if done == 1 else extremes.normalize(normalize, y, x, *given, residual, relu)
    raise _refused(x, mean, invstd, weight, bias, residual)


def backward_reduce(
    dy: Any, x: Any, mean: Any, invstd: Any, gate: Any = None
) -> tuple[np.ndarray, np.ndarray, Any]:
    sums = np.empty((2, x.shape[1]))
    weight, bias, saved = gate or (None, None, None)
    for near, vectors, (dz, y) in _attempts(x, (mean, invstd, weight, bias), dy, saved):
        out = None if y is None else _empty_like(near)
        if done := _cpu.backward_reduce(dz, near, *vectors, y, out, gate is not None, sums, _threads(x)):
            if done > 1:
                extremes.backward_reduce(backward_reduce, sums, dy, x, mean, invstd, gate)
            return sums[0], sums[1], dz if out is None else out
    raise _refused(dy, x, mean, invstd, weight, bias)


def backward_elementwise(
    dz: Any, x: Any, mean: Any, invstd: Any, weight: Any, mean_dy: Any, mean_dy_xmu: Any, gate: Any = None
) -> Any:
    relu = gate is not None and gate.y is None
    vectors = mean, invstd, weight, gate.bias if relu else None, mean_dy, mean_dy_xmu
    for near, those, like in _attempts(x, vectors, dz):
        dx = _empty_like(near)
        if done := _cpu.backward_elementwise(*like, near, *those, dx, relu, _threads(x)):
            if done > 1:
                means = mean_dy, mean_dy_xmu
                extremes.backward_elementwise(
                    backward_elementwise, dx, dz, x, mean, invstd, weight, means, gate
                )
            return dx
    raise _refused(dz, x, *vectors)


def _attempts(x: Any, vectors: Any, *others: Any) -> Iterator[tuple[Any, Any, Any]]:
    """``x``, vectors of length C and the others as they are; then the others in the memory format of ``x``;
    then copies of all without gaps, such as of what is not aligned, or has its values elsewhere."""
    yield x, vectors, others
    yield x, vectors, [None if other is None else _like(other, x) for other in others]
    x = _dense(x)
    vectors = [None if vector is None else _dense(vector) for vector in vectors]
    yield x, vectors, [None if other is None else _like(other, x) for other in others]


def _refused(*arrays: Any) -> MPISyncBNError:
    found = ", ".join(
        f"{type(each).__name__} of {each.dtype} {tuple(each.shape)}" for each in arrays if each is not None
    )
    return MPISyncBNError(
        f"expected arrays in host memory, of one shape and dtype, got one that cannot be read among {found}"
        f"{on_rank()}: hand over plain arrays"
    )


def _threads(x: Any) -> int:
    return 0 if isinstance(x, np.ndarray) else loaded_torch().get_num_threads()  # 0: as many as OpenMP has


def _empty_like(x: Any) -> Any:
    return np.empty_like(x, subok=False) if isinstance(x, np.ndarray) else loaded_torch().empty_like(x)


def _dense(x: Any) -> Any:
    return x.copy(order="K") if isinstance(x, np.ndarray) else x.clone()


def _like(values: Any, x: Any) -> Any:
    copy = _empty_like(x)
    copy[...] = values
    return copy
