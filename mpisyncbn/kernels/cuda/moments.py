"""Local moments in Triton.

A program takes a share of the tiles of one channel (or of a block of channels, if channels lie side
by side). It adds them up place by place in the compute dtype: they are so few that float32 keeps
its digits. A second kernel merges the results of all programs of a channel in float64 and in a
fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    any_channel,
    channels_of_program,
    load_tile,
    multiple_of,
    share_of_program,
    sum_per_channel,
)

__all__ = ["merge_moments", "moments"]


@triton.jit(do_not_specialize=["rows", "tiles", "share"])
def moments(
    x,
    partials,
    out,
    rows,
    width,
    stride,
    tiles,
    share,
    channels,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    ONE: tl.constexpr,
):
    """Store the moments of each program's tiles: the mean in two parts, M2 and the count.

    ``ONE`` says that each channel is a single tile. Grid: (channels or blocks of them, shares of
    tiles). ``partials`` is float64 of shape (shares, 4, channels). It is None for a single share,
    whose result goes to ``out``, see merge_moments.
    """
    width, stride = multiple_of(width, ALIGN), multiple_of(stride, ALIGN)
    begin, end = share_of_program(share, tiles)
    origin, mean_lo, m2, total = _moments_of_tiles(
        x, begin, end, rows, width, stride, ONE, INDEX, PLANES, ROWS, COLUMNS, COMPUTE_DTYPE
    )
    mean_hi = origin.to(tl.float64)
    m2 = tl.where(m2 < 0, 0.0, m2)
    channel = channels_of_program(COLUMNS, PLANES)
    inside = channel < channels
    if partials is None:
        _store_moments(out, mean_hi, mean_lo, m2, channel, channels, COMPUTE_DTYPE == tl.float64)
    else:
        pointer = partials + tl.program_id(1) * 4 * channels + channel
        tl.store(pointer, mean_hi, inside)
        tl.store(pointer + channels, mean_lo, inside)
        tl.store(pointer + 2 * channels, m2, inside)
        tl.store(pointer + 3 * channels, tl.zeros_like(mean_lo) + total, inside)


@triton.jit(do_not_specialize=["shares"])
def merge_moments(
    partials, out, shares, channels, SPLIT_MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Merge the partial moments of each channel (Chan, Golub and LeVeque 1979, eq. 2.1).

    ``out`` is of shape (2, channels); with ``SPLIT_MEAN`` (3, channels), the mean in two rows.
    """
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    # Means as distances from one of them: small numbers, which keep their digits.
    origin = tl.load(partials + channel, inside, 0.0)
    counts = tl.zeros([ROWS, COLUMNS], tl.float64)
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, shares, ROWS):
        count, distance, _ = _load_partials(partials, origin, begin, channel, shares, channels, ROWS)
        counts += count
        sums += count * distance
    total = tl.sum(counts, 0)
    mean = tl.sum(sums, 0) / tl.where(inside, total, 1.0)
    squares = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, shares, ROWS):
        count, distance, m2 = _load_partials(partials, origin, begin, channel, shares, channels, ROWS)
        distance -= mean[None, :]
        squares += m2 + count * distance * distance
    _store_moments(out, origin, mean, tl.sum(squares, 0), channel, channels, SPLIT_MEAN)


@triton.jit
def _moments_of_tiles(
    x,
    begin,
    end,
    rows,
    width,
    stride,
    ONE: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """A number near the mean, the rest of the mean, M2 and count, for the tiles before ``end``."""
    values, _, count = load_tile(x, begin, end, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
    # Squares of distances from a number near the mean lose no digits.
    origin = (sum_per_channel(values.to(tl.float64), PLANES) * (1.0 / count.to(tl.float64))).to(COMPUTE_DTYPE)
    mean_lo, m2, total = _moments_about(
        x, origin, 1.0, begin, end, rows, width, stride, ONE, INDEX, PLANES, ROWS, COLUMNS, COMPUTE_DTYPE
    )
    far = mean_lo * mean_lo * total > 4 * m2
    # If the first tile was not typical, the squares have lost digits: repeat them about the mean.
    if not ONE and any_channel(far, PLANES):
        origin = tl.where(far, origin + mean_lo.to(COMPUTE_DTYPE), origin)
        mean_lo, m2, total = _moments_about(
            x, origin, 1.0, begin, end, rows, width, stride, ONE, INDEX, PLANES, ROWS, COLUMNS, COMPUTE_DTYPE
        )
    # In float32, squares below 1e-30 may have lost digits, and squares above 1e30 may be infinite:
    # repeat them in other units.
    beyond = (m2 < total * 2.0**-100) | ~(m2 <= total * 2.0**100)
    if COMPUTE_DTYPE == tl.float32 and any_channel(beyond, PLANES):
        unit = tl.where(m2 < total, 2.0**90, 2.0**-90)
        unit = tl.where(beyond, unit, 1.0).to(COMPUTE_DTYPE)
        mean_lo, m2, total = _moments_about(
            x, origin, unit, begin, end, rows, width, stride, ONE, INDEX, PLANES, ROWS, COLUMNS, COMPUTE_DTYPE
        )
        per = 1.0 / unit.to(tl.float64)
        mean_lo, m2 = mean_lo * per, m2 * per * per
    return origin, mean_lo, m2, total


@triton.jit
def _moments_about(
    x,
    origin,
    unit,
    begin,
    end,
    rows,
    width,
    stride,
    ONE: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """The mean of ``(x - origin) * unit``, M2 and count in float64, for the tiles before ``end``.

    ``unit`` is a power of two.
    """
    values, mask, count = load_tile(x, begin, end, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
    sums = tl.where(mask, values.to(COMPUTE_DTYPE) - origin, 0.0) * unit
    squares = sums * sums
    total = count.to(tl.int64)
    if not ONE:
        for tile in range(begin + 1, end, 2):
            # both are loaded before either is used, because memory is slow to answer
            values, mask, count = load_tile(x, tile, end, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
            more, more_mask, more_count = load_tile(
                x, tile + 1, end, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS
            )
            distance = tl.where(mask, values.to(COMPUTE_DTYPE) - origin, 0.0) * unit
            sums += distance
            squares += distance * distance
            distance = tl.where(more_mask, more.to(COMPUTE_DTYPE) - origin, 0.0) * unit
            sums += distance
            squares += distance * distance
            total += count + more_count
    total = total.to(tl.float64)
    found = sum_per_channel(sums.to(tl.float64), PLANES)
    mean = found * (1.0 / total)
    return mean, sum_per_channel(squares.to(tl.float64), PLANES) - found * mean, total


@triton.jit
def _store_moments(out, mean_hi, mean_lo, m2, channel, channels, SPLIT_MEAN: tl.constexpr):
    inside = channel < channels
    if SPLIT_MEAN:
        tl.store(out + channel, mean_hi, inside)
        tl.store(out + channels + channel, mean_lo, inside)
        tl.store(out + 2 * channels + channel, m2, inside)
    else:
        tl.store(out + channel, mean_hi + mean_lo, inside)
        tl.store(out + channels + channel, m2, inside)


@triton.jit
def _load_partials(partials, origin, begin, channel, shares, channels, ROWS: tl.constexpr):
    """Counts, distances of means from ``origin``, and M2 for ``ROWS`` shares; 0 beyond the last."""
    row = begin + tl.arange(0, ROWS)
    mask = (row < shares)[:, None] & (channel < channels)[None, :]
    pointer = partials + row[:, None] * 4 * channels + channel[None, :]
    mean_hi, mean_lo = tl.load(pointer, mask, 0.0), tl.load(pointer + channels, mask, 0.0)
    m2, count = tl.load(pointer + 2 * channels, mask, 0.0), tl.load(pointer + 3 * channels, mask, 0.0)
    return count, tl.where(mask, (mean_hi - origin[None, :]) + mean_lo, 0.0), m2
