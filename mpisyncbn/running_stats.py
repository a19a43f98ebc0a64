"""Running statistics: exponential averages of each batch's mean and unbiased variance.

``record_batch`` picks the shortest way:

- One call of native code, if the statistics and the running ones are in host memory.
- One kernel on the device, if the running ones are there and the host knows the statistics too.
- Operations of NumPy, CuPy or torch, if there is no such kernel.
- Operations that also decide whether to update, if only a device or a compiled graph knows the
  statistics. The host does not wait for them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .arguments import check_running, check_stats
from .batch_stats import BatchStats
from .comm import transport
from .errors import on_rank
from .kernels import Array, has_float64, kernels_for, loaded_torch, native
from .kernels.protocol import Running

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["are_finite", "can_record", "only_torch_changes", "record_batch", "update_running_stats"]

# running_mean, running_var and num_batches_tracked
Averages: TypeAlias = "tuple[Array, Array, Tensor | None]"


def update_running_stats(
    running_mean: Array, running_var: Array, stats: BatchStats, momentum: float | Array
) -> bool | Array:
    """Move the running statistics towards those of the batch, in place.

    ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance of the
    group's batch. An empty batch changes nothing, and neither does one with a statistic that is not
    finite in the dtype of the running statistics. ``stats`` decides that, so all ranks do the same.

    Args:
        running_mean, running_var: of length C, floating point, any array.
        stats: of the batch; ``invstd`` is not used.
        momentum: weight of this batch, from 0 to 1: a number, or a 0-d array of their kind, in host
            memory or on their device.

    Returns:
        Whether they were updated, as a bool; as a 0-d array if only a device or a compiled graph
        knows that. Not collective.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype, device or range.
    """
    check_running(running_mean, running_var, momentum)
    check_stats(stats, ("mean", "var"), len(running_mean), running_mean)
    return record_batch(running_mean, running_var, None, stats, momentum)


def record_batch(
    running_mean: Array,
    running_var: Array,
    num_batches_tracked: Tensor | None,
    stats: BatchStats,
    momentum: float | Array,
    device_stats: BatchStats | None = None,
) -> bool | Array:
    """Do ``update_running_stats`` without checks, and add 1 to ``num_batches_tracked``.

    If anything raises, nothing is changed.

    Args:
        running_mean, running_var: floating point, of length C.
        num_batches_tracked: the count of a layer, or None.
        stats: of the batch; ``invstd`` is not used.
        momentum: a number from 0 to 1, or a 0-d array.
        device_stats: the statistics on the device of the running ones, if known there.

    Returns:
        Whether the batch was recorded: a bool, or a 0-d array if only a device or a compiled graph
        knows that. Not collective.
    """
    running = running_mean, running_var, num_batches_tracked
    if momentum.__class__ is not float and transport.is_readable_now(momentum):
        momentum = float(momentum)
    if _record_natively(running, stats, momentum):
        return True
    if isinstance(stats.count, np.generic):
        stats = stats._replace(count=int(stats.count))
    if not isinstance(stats.count, int):
        return _record_without_sync(running, stats, momentum)
    if stats.count == 0:
        return False
    if transport.on_host(stats.mean) or transport.on_host(running_mean):
        return _record_from_host(running, stats, momentum, device_stats)
    return _record_without_sync(running, stats, momentum)


def are_finite(stats: BatchStats, running_var: Array) -> bool:
    """Whether statistics on the host are finite in the dtype of the running ones."""
    with np.errstate(all="ignore"):
        return _fits(stats.mean, stats.var * _bessel_factor(stats.count), running_var)


def only_torch_changes(array: Array) -> bool:
    """Whether it is a tensor that requires a gradient, or is of inference mode.

    torch refuses some changes of these. Native code does not change them.
    """
    return hasattr(array, "is_inference") and (array.requires_grad or array.is_inference())


def can_record(x: Array, running: Running) -> bool:
    """Whether kernels for ``x``, a tensor on a GPU, can change these running statistics."""
    tensor = loaded_torch().Tensor
    return all(
        each is None or (type(each) is tensor and each.device == x.device and each.is_contiguous())
        for each in running[:3]
    )


def _bessel_factor(count: int) -> float:
    """The unbiased variance over the biased one, ``count / (count - 1)``; 1 for a single value."""
    return count / max(count - 1, 1)


def _record_natively(running: Averages, stats: BatchStats, momentum: float | Array) -> bool:
    """Record a batch in one native call. If that refuses, return False and change nothing."""
    running_mean, _, num_batches_tracked = running
    if not (
        type(stats.mean) is np.ndarray
        and type(stats.var) is np.ndarray
        and stats.count
        and transport.on_host(running_mean)
        and momentum.__class__ is float
        and (native_cpu := native()) is not None
        and not any(map(only_torch_changes, running))
    ):
        return False
    arrays = *running, transport.version_counter_of(running_mean)
    factor = _bessel_factor(stats.count)
    ahead = 0 if num_batches_tracked is None else num_batches_tracked._version - running_mean._version
    try:
        return native_cpu.update_running_stats(*arrays, stats.mean, stats.var, factor, momentum)
    except BaseException:
        if num_batches_tracked is not None and num_batches_tracked._version - running_mean._version > ahead:
            num_batches_tracked.sub_(1)  # the batch was counted before the error
        raise


def _record_from_host(
    running: Averages, stats: BatchStats, momentum: float | Array, device_stats: BatchStats | None
) -> bool:
    """Record a batch whose statistics the host knows. Returns whether it was recorded.

    The running statistics may be in host memory or on a device.
    """
    mean, var = transport.to_host(stats.mean, stats.var)
    with np.errstate(all="ignore"):
        unbiased = var * _bessel_factor(stats.count)
        if not _fits(mean, unbiased, running[1]):
            _warn_not_finite(on_rank())
            return False
    if device_stats is None or not _record_on_device(running, device_stats, momentum):
        lerp_(running[:2], (mean, unbiased), momentum, running[2])
    return True


def _record_on_device(running: Averages, stats: BatchStats, momentum: float | Array) -> bool:
    """Record a batch in one kernel, from statistics on the device. False if no kernel can."""
    if transport.on_host(stats.mean) or type(momentum) is not float:
        return False
    record = getattr(kernels_for(running[0]), "record_batch", None)
    arrays = *running, stats.mean, stats.var
    return record is not None and record(*arrays, _bessel_factor(stats.count), momentum)


def _record_without_sync(running: Averages, stats: BatchStats, momentum: float | Array) -> Array:
    """Record a batch whose statistics the host neither knows nor waits for. It never warns.

    Returns whether the batch was recorded, as a 0-d array.
    """
    running_mean, running_var, num_batches_tracked = running
    count, mean = stats.count, stats.mean
    divisor = max(count - 1, 1) if isinstance(count, int) else abs(count - 1) + (count == 1)
    unbiased = stats.var * (count / divisor)
    largest = _finfo_max(running_var)
    fits = (count > 0) & (abs(mean).max() <= largest) & (unbiased.max() <= largest)
    for average, batch in ((running_mean, mean), (running_var, unbiased)):
        if hasattr(average, "copy_"):  # torch
            convert = "double" if has_float64(average) else "float"
            old, new = getattr(average, convert)(), getattr(batch, convert)()
            average.copy_(lerp(old, new, momentum).where(fits, old))
        else:
            average[...] = np.where(fits, lerp(average, batch, momentum), average)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(fits)
    return fits


def _fits(mean: np.ndarray, unbiased: np.ndarray, running: Array) -> bool:
    """Whether all values of both vectors are finite in the dtype of the running statistics."""
    largest = _finfo_max(running)
    # The norms bound the maxima, for a fifth of their cost. With NaN the comparison is false.
    if mean.dot(mean) + unbiased.dot(unbiased) <= min(largest * largest, sys.float_info.max):
        return True
    return bool(np.abs(mean).max() <= largest and unbiased.max() <= largest)


def _finfo_max(array: Array) -> float:
    """The largest finite number of an array's dtype."""
    if hasattr(array, "is_cpu"):
        import torch  # torch.compile cannot trace loaded_torch()

        return torch.finfo(array.dtype).max
    return float(np.finfo(array.dtype).max)


@lru_cache(maxsize=1)
def _warn_not_finite(rank: str) -> None:
    warnings.warn(
        "a batch whose mean or variance is not finite, or overflows the dtype of the running statistics, was "
        f"kept out of the running statistics{rank}; further ones will be, silently",
        RuntimeWarning,
        stacklevel=5,  # the caller of functional.update_running_stats
    )


def lerp_(
    running: Sequence[Array],
    batch: Sequence[np.ndarray],
    momentum: float | Array,
    num_batches_tracked: Tensor | None = None,
) -> None:
    """Set ``running = (1 - momentum) * running + momentum * batch`` in place.

    Adds 1 to ``num_batches_tracked``, if it is not None. If anything raises, nothing is changed.
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
    """``(1 - momentum) * old + momentum * new``, rounded as ``torch.lerp`` does.

    It is a step from the nearer end, so that a momentum of 1 gives ``new`` exactly.
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
    """Restore the arrays if anything raises inside, an interrupt for example.

    Arrays on a device are not restored: only an interrupt raises there, and copies of them would
    take longer than the update.
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
            with suppress(Exception):  # an array that cannot be written has not changed
                each[...] = copy
        raise
