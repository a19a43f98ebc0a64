"""The four kernels for NumPy arrays and torch tensors in host memory, by native code: module.cpp.

Importing this module fails if the extension was not built; then aten.py and generic.py serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TypeVar, cast

import numpy as np

from ...errors import MPISyncBNError, on_rank
from .. import extremes, loaded_torch
from ..activation import NO_ACTIVATION, Activation, ActivationContext, Kind, recomputed_activation
from ..protocol import Array
from . import _cpu
from ._cpu import (
    Call,
    Launches,
    Link,
    StreamWorker,
    Total,
    add_departing_group,
    describe,
    install_finalize_hook,
    instruction_set,
    invstd,
    most_dimensions,
    passes_fast_check,
    threads,
    update_running_stats,
    use_tensors,
)

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]
# Other native code: see link.h, running_stats.h and leave.h.
__all__ += ["Call", "Launches", "Link", "StreamWorker", "Total"]
__all__ += ["add_departing_group", "install_finalize_hook", "invstd", "passes_fast_check"]
__all__ += ["describe", "use_tensors"]
__all__ += ["instruction_set", "most_dimensions", "threads", "update_running_stats"]

_Arrays = TypeVar("_Arrays", bound=tuple[Array | None, ...])
_Vectors = TypeVar("_Vectors", bound=tuple[Array | None, ...])

# ``dz`` of these kinds is stored, and not computed twice. Forward and backward together then take
# 0.8 to 0.93 of the time in bfloat16; in float32 0.92 (GELU), 1.0 (its tanh form) and 1.1 (SiLU).
# With ELU and hardswish they would take up to 1.25.
_STORED = (Kind.SILU, Kind.GELU, Kind.GELU_TANH)

_REFUSED, _EXTREME = 0, 2  # outcomes, see _cpu.pyi


def local_moments(x: Array, *, mask: Array | None = None) -> tuple[int, np.ndarray, np.ndarray]:
    found = np.empty((3, x.shape[1]))
    outcome, count = _cpu.local_moments(x, mask, found, _threads(x))
    if outcome == _REFUSED:
        mask_read = None if mask is None else _dense(mask)
        outcome, count = _cpu.local_moments(_dense(x), mask_read, found, _threads(x))
    if outcome == _REFUSED:
        raise _refused(x, mask)
    if outcome == _EXTREME:
        extremes.local_moments(partial(local_moments, mask=mask), x, count, found[0], found[2])
    return count, found[:2] if x.dtype.itemsize == 8 else found[0], found[2]


def normalize(
    x: Array,
    mean: np.ndarray,
    invstd: np.ndarray,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None = None,
    activation: Activation = NO_ACTIVATION,
    *,
    mask: Array | None = None,
) -> Array:
    small = mean, invstd, weight, bias, mask
    for x_read, vectors, (residual_read,) in _attempts(x, small, (residual,)):
        y = _empty_like(x_read)
        outcome = _cpu.normalize(x_read, *vectors, residual_read, y, *activation, _threads(x))
        if outcome == _EXTREME:
            again = partial(normalize, mask=mask)
            extremes.normalize(again, y, x, mean, invstd, weight, bias, residual, activation)
        if outcome != _REFUSED:
            return y
    raise _refused(x, residual, *small)


def backward_reduce(
    dy: Array,
    x: Array,
    mean: np.ndarray,
    invstd: np.ndarray,
    context: ActivationContext | None = None,
    *,
    mask: Array | None = None,
) -> tuple[np.ndarray, np.ndarray, Array]:
    sums = np.empty((2, x.shape[1]))
    context = context or ActivationContext(NO_ACTIVATION, None, None)
    activation, weight, bias, *more = context
    small = mean, invstd, weight, bias, mask
    for x_read, vectors, (dz, y, residual) in _attempts(x, small, (dy, *more)):
        out = _empty_like(x_read) if _stores_dz(context) else None
        others, how = (y, residual, out), (*activation, context.undone)
        outcome = _cpu.backward_reduce(dz, x_read, *vectors, *others, *how, sums, _threads(x))
        if outcome == _EXTREME:
            again = partial(backward_reduce, mask=mask)
            extremes.backward_reduce(again, sums, dy, x, mean, invstd, context, out)
        if outcome != _REFUSED:
            return sums[0], sums[1], dz if out is None else out
    raise _refused(dy, x, *small)


def backward_elementwise(
    dz: Array,
    x: Array,
    mean: np.ndarray,
    invstd: np.ndarray,
    weight: Array | None,
    mean_dy: np.ndarray,
    mean_dy_xmu: np.ndarray,
    context: ActivationContext | None = None,
    *,
    mask: Array | None = None,
) -> Array:
    activation, bias = recomputed_activation(None if _stores_dz(context) else context)
    vectors = mean, invstd, weight, bias, mean_dy, mean_dy_xmu, mask
    how = *activation, context is not None and context.undone
    for x_read, vectors_read, (dz_read,) in _attempts(x, vectors, (dz,)):
        dx = _empty_like(x_read)
        outcome = _cpu.backward_elementwise(dz_read, x_read, *vectors_read, dx, *how, _threads(x))
        if outcome == _EXTREME:
            again, means = partial(backward_elementwise, mask=mask), (mean_dy, mean_dy_xmu)
            extremes.backward_elementwise(again, dx, dz, x, mean, invstd, weight, means, context)
        if outcome != _REFUSED:
            return dx
    raise _refused(dz, x, *vectors)


def _stores_dz(context: ActivationContext | None) -> bool:
    """Whether ``backward_reduce`` stores ``dz``, which ``backward_elementwise`` then reads."""
    return context is not None and (context.stores_dz or context.activation.kind in _STORED)


def _attempts(x: Array, vectors: _Vectors, others: _Arrays) -> Iterator[tuple[Array, _Vectors, _Arrays]]:
    """Yield arrays to try the native code on, until it refuses none.

    First all arrays are as they are: ``x``, vectors of length C or a mask, and others. Then the
    others are copies in the memory format of ``x``. Last, all are copies without gaps, for arrays
    that are not aligned or have no memory of their own.
    """
    yield x, vectors, others
    yield x, vectors, _in_format_of(x, others)
    x = _dense(x)
    vectors = cast(_Vectors, tuple(None if vector is None else _dense(vector) for vector in vectors))
    yield x, vectors, _in_format_of(x, others)


def _refused(*arrays: Array | None) -> MPISyncBNError:
    found = ", ".join(
        f"{type(each).__name__} of {each.dtype} {tuple(each.shape)}" for each in arrays if each is not None
    )
    return MPISyncBNError(
        f"expected arrays in host memory, of one shape and dtype, got one that cannot be read among {found}"
        f"{on_rank()}: pass plain arrays"
    )


def _threads(x: Array) -> int:
    return 0 if isinstance(x, np.ndarray) else loaded_torch().get_num_threads()  # 0: as many as OpenMP has


def _empty_like(x: Array) -> Array:
    return np.empty_like(x, subok=False) if isinstance(x, np.ndarray) else loaded_torch().empty_like(x)


def _dense(x: Array) -> Array:
    return x.copy(order="K") if isinstance(x, np.ndarray) else x.clone()


def _in_format_of(x: Array, others: _Arrays) -> _Arrays:
    """Copies of ``others`` in the memory format of ``x``."""
    copies = [None if other is None else _empty_like(x) for other in others]
    for copy, other in zip(copies, others, strict=True):
        if copy is not None:
            copy[...] = other
    return cast(_Arrays, tuple(copies))
