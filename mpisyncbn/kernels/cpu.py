"""The four verbs for NumPy arrays and torch tensors in host memory, by native code: cpu.cpp.

Importing this fails where the extension was not built; then aten.py and generic.py serve.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np

from ..errors import MPISyncBNError, on_rank
from . import _cpu
from ._cpu import Link, fits, instruction_set, invstd, update_running_stats

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]
# Not verbs, but native as well: what comes before and between them, see cpu_link.h.
__all__ += ["Link", "fits", "instruction_set", "invstd", "update_running_stats"]


def local_moments(x: Any) -> tuple[int, np.ndarray, np.ndarray]:
    found = np.empty((3, x.shape[1]))
    count = _cpu.local_moments(x, found, _threads(x))
    if count < 0:
        count = _cpu.local_moments(_dense(x), found, _threads(x))
        _must(count >= 0)
    return count, found[:2] if x.dtype.itemsize == 8 else found[0], found[2]


def normalize(
    x: Any, mean: Any, invstd: Any, weight: Any, bias: Any, residual: Any = None, relu: bool = False
) -> Any:
    y = _empty_like(x)
    vectors = mean, invstd, weight, bias
    if not _cpu.normalize(x, *vectors, residual, y, relu, _threads(x)):
        x = _dense(x)
        residual = None if residual is None else _like(residual, x)
        y = _empty_like(x)
        _must(_cpu.normalize(x, *vectors, residual, y, relu, _threads(x)))
    return y


def backward_reduce(
    dy: Any, x: Any, mean: Any, invstd: Any, gate: Any = None
) -> tuple[np.ndarray, np.ndarray, Any]:
    sums = np.empty((2, x.shape[1]))
    weight, bias, y = gate or (None, None, None)
    vectors = mean, invstd, weight, bias
    dz = dy if y is None else _empty_like(x)
    if not _cpu.backward_reduce(
        dy, x, *vectors, y, None if y is None else dz, gate is not None, sums, _threads(x)
    ):
        x = _dense(x)
        dy = _like(dy, x)
        if y is None:
            dz = dy
        else:
            y, dz = _like(y, x), _empty_like(x)
        _must(
            _cpu.backward_reduce(
                dy, x, *vectors, y, None if y is None else dz, gate is not None, sums, _threads(x)
            )
        )
    return sums[0], sums[1], dz


def backward_elementwise(
    dz: Any, x: Any, mean: Any, invstd: Any, weight: Any, mean_dy: Any, mean_dy_xmu: Any, gate: Any = None
) -> Any:
    relu = gate is not None and gate.y is None
    vectors = mean, invstd, weight, gate.bias if relu else None, mean_dy, mean_dy_xmu
    dx = _empty_like(x)
    if not _cpu.backward_elementwise(dz, x, *vectors, dx, relu, _threads(x)):
        x = _dense(x)
        dx = _empty_like(x)
        _must(_cpu.backward_elementwise(_like(dz, x), x, *vectors, dx, relu, _threads(x)))
    return dx


def _must(understood: bool) -> None:
    if not understood:
        raise MPISyncBNError(
            f"expected arrays in host memory, of one shape and dtype, got one that cannot be read{on_rank()}"
        )


def _threads(x: Any) -> int:
    return 0 if type(x) is np.ndarray else _torch().get_num_threads()  # 0: as many as OpenMP has


def _empty_like(x: Any) -> Any:
    return np.empty_like(x) if type(x) is np.ndarray else _torch().empty_like(x)


@cache
def _torch() -> Any:
    return sys.modules["torch"]  # whoever has a tensor has imported it


def _dense(x: Any) -> Any:
    return x.copy(order="K") if type(x) is np.ndarray else x.clone()


def _like(values: Any, x: Any) -> Any:
    copy = _empty_like(x)
    copy[...] = values
    return copy
