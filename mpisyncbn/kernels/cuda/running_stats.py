"""The update of running statistics in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["record_batch", "record_enqueued"]


@triton.jit(do_not_specialize=["channels", "to_unbiased", "momentum"])
def record_batch(
    running_mean,
    running_var,
    num_batches_tracked,
    mean,
    var,
    channels,
    to_unbiased,
    momentum,
    COLUMNS: tl.constexpr,
):
    """Move running statistics towards those of a batch, and count the batch.

    ``num_batches_tracked`` may be None. ``to_unbiased`` and ``momentum`` are the bits of float64
    numbers.
    """
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    unbiased = tl.load(var + channel, inside, 0.0) * _float64_of(to_unbiased)
    _lerp(running_mean, tl.load(mean + channel, inside, 0.0), momentum, channel, inside)
    _lerp(running_var, unbiased, momentum, channel, inside)
    if num_batches_tracked is not None:
        tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1, tl.program_id(0) == 0)


@triton.jit(do_not_specialize=["channels", "momentum"])
def record_enqueued(
    running_mean,
    running_var,
    num_batches_tracked,
    mean,
    var,
    more,
    channels,
    momentum,
    COLUMNS: tl.constexpr,
):
    """Do the update of ``record_batch`` for a batch whose count the host does not know.

    ``more`` holds the count, the unbiased variance over the biased one, and 0 if the batch is to be
    left out, else 1.
    """
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    takes_batch = tl.load(more + 2) > 0
    inside = (channel < channels) & takes_batch
    unbiased = tl.load(var + channel, inside, 0.0) * tl.load(more + 1)
    _lerp(running_mean, tl.load(mean + channel, inside, 0.0), momentum, channel, inside)
    _lerp(running_var, unbiased, momentum, channel, inside)
    if num_batches_tracked is not None:
        counts = (tl.program_id(0) == 0) & takes_batch
        tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1, counts)


@triton.jit
def _lerp(running, new, momentum, channel, inside):
    old = tl.load(running + channel, inside, 0.0).to(tl.float64)
    weight, step = _float64_of(momentum), new - old
    # a step from the nearer end, as in torch.lerp: a momentum of 1 gives the batch
    moved = tl.where(weight < 0.5, old + weight * step, new - (1 - weight) * step)
    if running.dtype.element_ty != tl.float64:
        moved = moved.to(tl.float32)  # torch rounds to half precision by way of float32
    tl.store(running + channel, moved.to(running.dtype.element_ty), inside)


@triton.jit
def _float64_of(bits):
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)
