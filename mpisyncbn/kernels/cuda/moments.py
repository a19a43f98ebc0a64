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
    UNROLL,
    any_channel,
    channels_of_program,
    load_tile,
    multiple_of,
    next_place,
    partial_of_program,
    place_of,
    share_of_program,
    sum_per_channel,
    tile_offsets,
    values_before,
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
    tiles). ``partials`` is float64 of shape (4, channels, shares). It is None for a single share,
    whose result goes to ``out``, see merge_moments.
    """
    width, stride = multiple_of(width, ALIGN), multiple_of(stride, ALIGN)
    begin, end = share_of_program(share, tiles)
    first, count = _counts(begin, end, rows, width, INDEX, PLANES, ROWS, COLUMNS)
    origin, mean_lo, m2 = _moments_of_tiles(
        x, begin, end, first, count, rows, width, stride, ONE, INDEX, PLANES, ROWS, COLUMNS, COMPUTE_DTYPE
    )
    m2 = tl.where(m2 < 0, 0.0, m2)
    channel = channels_of_program(COLUMNS, PLANES)
    if partials is None:
        _store_moments(
            out, origin.to(tl.float64), mean_lo, m2, channel, channels, COMPUTE_DTYPE == tl.float64
        )
    else:
        inside = channel < channels
        pointer, row = partial_of_program(partials, channel, channels)
        tl.store(pointer, origin.to(tl.float64), inside)
        tl.store(pointer + row, mean_lo, inside)
        tl.store(pointer + 2 * row, m2, inside)
        tl.store(pointer + 3 * row, tl.zeros_like(mean_lo) + count, inside)


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
    origin = tl.load(partials + channel.to(tl.int64) * shares, inside, 0.0)
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
    first_count,
    count,
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
    """A number near the mean, the rest of the mean, and M2, for the tiles before ``end``."""
    row, column = place_of(begin, width, INDEX, PLANES, ROWS, COLUMNS)
    first = load_tile(x, row, column, rows, width, stride, 0.0, PLANES, ROWS, COLUMNS)
    second = None
    if not ONE:  # loaded while the first is added up
        row, column = next_place(row, column, width, PLANES, ROWS, COLUMNS)
        there = tl.where(begin + 1 < end, rows, 0)
        second = load_tile(x, row, column, there, width, stride, 0.0, PLANES, ROWS, COLUMNS)
    # Squares of distances from a number near the mean lose no digits. It is of x's own dtype, so
    # that it can stand for the places beyond an edge.
    origin = sum_per_channel(first.to(tl.float64), PLANES) * _inverse(first_count)
    origin = origin.to(COMPUTE_DTYPE).to(x.dtype.element_ty).to(COMPUTE_DTYPE)
    mean_lo, m2 = _moments_about(
        x, origin, begin, end, count, rows, width, stride, ONE, INDEX, PLANES, ROWS, COLUMNS, first, second
    )
    far = mean_lo * mean_lo * count > 4 * m2
    # If the first tile was not typical, the squares have lost digits: repeat them about the mean.
    if not ONE and any_channel(far, PLANES):
        nearer = (origin.to(tl.float64) + mean_lo).to(COMPUTE_DTYPE).to(x.dtype.element_ty)
        origin = tl.where(far, nearer.to(COMPUTE_DTYPE), origin)
        mean_lo, m2 = _moments_about(
            x, origin, begin, end, count, rows, width, stride, ONE, INDEX, PLANES, ROWS, COLUMNS
        )
    # In float32, squares below 1e-30 may have lost digits, and squares above 1e30 may be infinite:
    # repeat them in other units.
    beyond = (m2 < count * 2.0**-100) | ~(m2 <= count * 2.0**100)
    if COMPUTE_DTYPE == tl.float32 and any_channel(beyond, PLANES):
        unit = tl.where(m2 < count, 2.0**90, 2.0**-90)
        unit = tl.where(beyond, unit, 1.0).to(COMPUTE_DTYPE)
        mean_lo, m2 = _moments_about(
            x, origin, begin, end, count, rows, width, stride, ONE, INDEX, PLANES, ROWS, COLUMNS, unit=unit
        )
        per = 1.0 / unit.to(tl.float64)
        mean_lo, m2 = mean_lo * per, m2 * per * per
    return origin, mean_lo, m2


@triton.jit
def _moments_about(
    x,
    origin,
    begin,
    end,
    count,
    rows,
    width,
    stride,
    ONE: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    first=None,
    second=None,
    unit=1.0,
):
    """The mean of ``(x - origin) * unit`` and M2 in float64, for the tiles before ``end``.

    ``unit`` is a power of two. ``first`` and ``second`` are the first tiles if these were loaded.
    """
    row, column = place_of(begin, width, INDEX, PLANES, ROWS, COLUMNS)
    _, mask = tile_offsets(row, column, rows, width, stride, PLANES, ROWS, COLUMNS)
    unroll: tl.constexpr = 1 if first is None or origin.dtype == tl.float64 else UNROLL
    if first is None:
        first = load_tile(x, row, column, rows, width, stride, 0.0, PLANES, ROWS, COLUMNS)
    narrow = origin.to(x.dtype.element_ty)
    sums = tl.zeros([ROWS, COLUMNS], origin.dtype)
    squares = tl.zeros([ROWS, COLUMNS], origin.dtype)
    first = tl.where(mask, first, narrow)
    if not ONE:
        row, column = next_place(row, column, width, PLANES, ROWS, COLUMNS)
        there = tl.where(begin + 1 < end, rows, 0)
        _, mask = tile_offsets(row, column, there, width, stride, PLANES, ROWS, COLUMNS)
        if second is None:
            second = load_tile(x, row, column, there, width, stride, 0.0, PLANES, ROWS, COLUMNS)
        second = tl.where(mask, second, narrow)
        for tile in tl.range(begin + 2, end, 2, loop_unroll_factor=unroll):
            # Two tiles are loaded while two others are added up, to hide the latency of memory.
            row, column = next_place(row, column, width, PLANES, ROWS, COLUMNS)
            third = load_tile(x, row, column, rows, width, stride, narrow, PLANES, ROWS, COLUMNS)
            row, column = next_place(row, column, width, PLANES, ROWS, COLUMNS)
            there = tl.where(tile + 1 < end, rows, 0)
            fourth = load_tile(x, row, column, there, width, stride, narrow, PLANES, ROWS, COLUMNS)
            sums, squares = _add_tile(sums, squares, first, origin, unit)
            sums, squares = _add_tile(sums, squares, second, origin, unit)
            first, second = third, fourth
        sums, squares = _add_tile(sums, squares, second, origin, unit)
    sums, squares = _add_tile(sums, squares, first, origin, unit)
    found = sum_per_channel(sums.to(tl.float64), PLANES)
    mean = found * _inverse(count)
    return mean, sum_per_channel(squares.to(tl.float64), PLANES) - found * mean


@triton.jit
def _counts(
    begin,
    end,
    rows,
    width,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """How many values of a channel lie in the first tile, and in all before ``end``, in float64."""
    before = values_before(begin, rows, width, INDEX, PLANES, ROWS, COLUMNS)
    first = values_before(begin + 1, rows, width, INDEX, PLANES, ROWS, COLUMNS) - before
    count = values_before(end, rows, width, INDEX, PLANES, ROWS, COLUMNS) - before
    return first.to(tl.float64), count.to(tl.float64)


@triton.jit
def _inverse(count):
    """One over a float64 count, by Newton's method: a division would make registers spill."""
    inverse = (1.0 / count.to(tl.float32)).to(tl.float64)
    inverse *= 2.0 - count * inverse
    return inverse * (2.0 - count * inverse)


@triton.jit
def _add_tile(sums, squares, values, origin, unit):
    distance = (values.to(sums.dtype) - origin) * unit
    return sums + distance, squares + distance * distance


@triton.jit
def _load_partials(partials, origin, begin, channel, shares, channels, ROWS: tl.constexpr):
    """Counts, distances of means from ``origin``, and M2 for ``ROWS`` shares; 0 beyond the last."""
    share = begin + tl.arange(0, ROWS)[:, None]
    mask = (share < shares) & (channel < channels)[None, :]
    row = tl.cast(channels, tl.int64) * shares
    pointer = partials + channel.to(tl.int64)[None, :] * shares + share
    mean_hi, mean_lo = tl.load(pointer, mask, 0.0), tl.load(pointer + row, mask, 0.0)
    m2, count = tl.load(pointer + 2 * row, mask, 0.0), tl.load(pointer + 3 * row, mask, 0.0)
    return count, tl.where(mask, (mean_hi - origin[None, :]) + mean_lo, 0.0), m2


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
