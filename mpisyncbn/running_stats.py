"""The update of running statistics: exponential averages of each batch's mean and unbiased variance.

``record_batch`` chooses who does it. In host memory that is one call of native code. Where the host knows a
batch's statistics, and the running ones are on a device, it is one kernel there. Where neither can, it is
operations of NumPy, CuPy or torch. And where the host does not know the statistics, because they are on a
device alone or in a compiled graph, these operations also decide whether to do it, so that nobody waits.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .comm import transport
from .errors import on_rank
from .kernels import Array, has_float64, kernels_for, loaded_torch, native

if TYPE_CHECKING:
    from torch import Tensor

    from .functional import BatchStats

__all__ = ["lerp", "lerp_", "record_batch"]


def record_batch(
    running_mean: Array,
    running_var: Array,
    num_batches_tracked: Tensor | None,
    stats: BatchStats,
    momentum: float | Array,
    device_stats: BatchStats | None = None,
) -> bool | Array:
    """Move the running statistics towards those of a batch, in place, and add 1 to ``num_batches_tracked``.

    functional.update_running_stats says what the new values are, and which batches are left out. Where
    anything raises, nothing is changed.

    Args:
        running_mean, running_var: floating point, of length C.
        num_batches_tracked: the count of a layer, or None.
        stats: of the batch; ``invstd`` is not looked at.
        momentum: a number from 0 to 1, or an array of no dimensions.
        device_stats: the same statistics on the device of the running ones, if they are known there.

    Returns:
        Whether the batch was recorded: a bool or, where only a device or a compiled graph knows that, an
        array of no dimensions. Not collective.
    """
    if momentum.__class__ is not float and transport.is_readable_now(momentum):
        momentum = float(momentum)
    if _record_natively(running_mean, running_var, num_batches_tracked, stats, momentum):
        return True
    if isinstance(stats.count, np.generic):
        stats = stats._replace(count=int(stats.count))
    count = stats.count
    if isinstance(count, int) and count == 0:
        return False
    if not isinstance(count, int) or not (transport.on_host(stats.mean) or transport.on_host(running_mean)):
        return _record_without_sync(running_mean, running_var, num_batches_tracked, stats, momentum)
    arrays = running_mean, running_var, num_batches_tracked
    return _record_from_host(*arrays, stats, momentum, device_stats)


def _record_natively(
    running_mean: Array,
    running_var: Array,
    num_batches_tracked: Tensor | None,
    stats: BatchStats,
    momentum: float | Array,
) -> bool:
    """Do it in one call of native code. Returns False where that refuses, and then nothing is changed."""
    count = stats.count
    if not (
        type(stats.mean) is np.ndarray
        and type(stats.var) is np.ndarray
        and count
        and transport.on_host(running_mean)
        and momentum.__class__ is float
        and (native_cpu := native()) is not None
    ):
        return False
    arrays = running_mean, running_var, num_batches_tracked, transport.version_counter_of(running_mean)
    ahead = 0 if num_batches_tracked is None else num_batches_tracked._version - running_mean._version
    try:
        to_unbiased = count / max(count - 1, 1)
        return native_cpu.update_running_stats(*arrays, stats.mean, stats.var, to_unbiased, momentum)
    except BaseException:
        if num_batches_tracked is not None and num_batches_tracked._version - running_mean._version > ahead:
            num_batches_tracked.sub_(1)  # counted, and then something went wrong
        raise


def _record_from_host(
    running_mean: Array,
    running_var: Array,
    num_batches_tracked: Tensor | None,
    stats: BatchStats,
    momentum: float | Array,
    device_stats: BatchStats | None,
) -> bool:
    """Do it from statistics that the host knows, wherever the running ones are. Returns whether it did."""
    mean, var = transport.to_host(stats.mean, stats.var)
    with np.errstate(all="ignore"):
        unbiased = var * (stats.count / max(stats.count - 1, 1))
        if not _fits(mean, unbiased, running_var):
            _warn_not_finite(on_rank())
            return False
    if (
        device_stats is None
        or device_stats.mean is stats.mean
        or not _record_on_device(running_mean, running_var, num_batches_tracked, device_stats, momentum)
    ):
        lerp_((running_mean, running_var), (mean, unbiased), momentum, num_batches_tracked)
    return True


def _record_on_device(
    running_mean: Array,
    running_var: Array,
    num_batches_tracked: Tensor | None,
    stats: BatchStats,
    momentum: float | Array,
) -> bool:
    """Do it in one kernel, from statistics on the device. Returns False where no kernel can."""
    if type(momentum) is not float:
        return False
    record = getattr(kernels_for(running_mean), "record_batch", None)
    to_unbiased = stats.count / max(stats.count - 1, 1)
    arrays = running_mean, running_var, num_batches_tracked, stats.mean, stats.var
    return record is not None and record(*arrays, to_unbiased, momentum)


def _record_without_sync(
    running_mean: Array,
    running_var: Array,
    num_batches_tracked: Tensor | None,
    stats: BatchStats,
    momentum: float | Array,
) -> Array:
    """Do it where the host does not know the statistics, and does not wait for them. Nothing warns there.

    Returns whether it was done, as an array of no dimensions.
    """
    count, mean = stats.count, stats.mean
    divisor = max(count - 1, 1) if isinstance(count, int) else (count - 1).clamp(min=1)
    unbiased = stats.var * (count / divisor)
    largest = _largest(running_var)
    fits = (count > 0) & (abs(mean).max() <= largest) & (unbiased.max() <= largest)
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        if hasattr(running, "copy_"):  # torch
            convert = "double" if has_float64(running) else "float"
            old, new = getattr(running, convert)(), getattr(batch, convert)()
            running.copy_(lerp(old, new, momentum).where(fits, old))
        else:
            running[...] = np.where(fits, lerp(running, batch, momentum), running)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(fits)
    return fits


def _fits(mean: np.ndarray, unbiased: np.ndarray, running: Array) -> bool:
    """Whether all of both is finite in the dtype of the running statistics."""
    largest = _largest(running)
    # The norms are an upper bound of the maxima, for a fifth of their cost. NaN is below nothing.
    if mean.dot(mean) + unbiased.dot(unbiased) <= min(largest * largest, sys.float_info.max):
        return True
    return bool(np.abs(mean).max() <= largest and unbiased.max() <= largest)


def _largest(array: Array) -> float:
    """The largest finite number of an array's dtype."""
    if hasattr(array, "is_cpu"):
        import torch  # torch.compile knows this, and not loaded_torch()

        return torch.finfo(array.dtype).max
    return float(np.finfo(array.dtype).max)


@lru_cache(maxsize=1)
def _warn_not_finite(rank: str) -> None:
    warnings.warn(
        "a batch whose mean or variance is not finite, or overflows the dtype of the running statistics, was "
        f"kept out of the running statistics{rank}; further ones will be, silently",
        RuntimeWarning,
        stacklevel=5,  # whoever called functional.update_running_stats
    )


def lerp_(
    running: Sequence[Array],
    batch: Sequence[np.ndarray],
    momentum: float | Array,
    num_batches_tracked: Tensor | None = None,
) -> None:
    """Set ``running = (1 - momentum) * running + momentum * batch`` in place, for vectors of one kind.

    Adds 1 to ``num_batches_tracked``, if it is not None. Where anything raises, nothing is changed.
    """
    if hasattr(running[0], "lerp_"):
        _lerp_tensors_(running, batch, momentum, num_batches_tracked)
        return
    # NumPy, CuPy
    news = transport.to_device_of(running[0], *batch)
    results = [lerp(old, new, momentum) for old, new in zip(running, news, strict=True)]
    with _all_or_nothing(*running):
        for old, result in zip(running, results, strict=True):
            old[...] = result


def _lerp_tensors_(
    running: Sequence[Tensor],
    batch: Sequence[np.ndarray],
    momentum: float | Array,
    num_batches_tracked: Tensor | None,
) -> None:
    torch, first = loaded_torch(), running[0]
    # Half precision is rounded once, after the sum.
    dtype = first.dtype
    if dtype.itemsize < 4:
        dtype = torch.float64 if has_float64(first) else torch.float32
    on_host = transport.on_host(first)
    news = (
        [torch.from_numpy(vector) for vector in batch] if on_host else transport.to_device_of(first, *batch)
    )
    news = [new.to(dtype) for new in news]
    weight = momentum if isinstance(momentum, (int, float)) else momentum.to(first.device, dtype)
    counts = () if num_batches_tracked is None else (num_batches_tracked,)
    with _all_or_nothing(*running, *counts):
        for old, new in zip(running, news, strict=True):
            if old.dtype == dtype:
                old.lerp_(new, weight)
            else:
                old.copy_(old.to(dtype).lerp_(new, weight))
        for count in counts:
            count.add_(1)


def lerp(old: Array, new: Array, momentum: float | Array) -> Array:
    """``(1 - momentum) * old + momentum * new``, rounded as ``torch.lerp`` does: a step from the nearer end.

    So a momentum of 1 gives ``new``, also if it is lost in ``new - old``.
    """
    if hasattr(old, "lerp"):
        if not isinstance(momentum, (int, float)):
            momentum = momentum.to(old.device, old.dtype)
        return old.lerp(new, momentum)
    step = new - old
    from_old, from_new = old + momentum * step, new - (1 - momentum) * step
    if transport.is_readable_now(momentum):
        return from_old if momentum < 0.5 else from_new
    return np.where(momentum < 0.5, from_old, from_new)


@contextmanager
def _all_or_nothing(*arrays: Array) -> Iterator[None]:
    """Take back what was written inside where anything raises there, an interrupt for example.

    Arrays on a device are not taken back: nothing but an interrupt raises there, and copies would take
    longer than the rest.
    """
    copies = [
        each.copy() if isinstance(each, np.ndarray) else each.clone()
        for each in arrays
        if transport.on_host(each)
    ]
    try:
        yield
    except BaseException:
        for each, copy in zip(arrays, copies, strict=False):
            with suppress(Exception):  # what cannot be written has not been
                each[...] = copy
        raise
