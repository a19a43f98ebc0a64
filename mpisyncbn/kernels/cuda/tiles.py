"""Tiles of a tensor and vectors of channels, for all Triton kernels.

A tensor without gaps is read as a matrix, in tiles of ``ROWS`` by ``COLUMNS`` values. In a
contiguous ``(N, C, *)`` tensor a row is a plane: the ``width`` values of a sample's channel
(``PLANES``). If the channels lie side by side, a row has a value of each of ``width`` channels.

Arithmetic is in ``COMPUTE_DTYPE``: float64 for a float64 tensor, else float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "UNROLL",
    "affine",
    "any_channel",
    "channels_of_program",
    "load_tile",
    "multiple_of",
    "next_place",
    "partial_of_program",
    "place_of",
    "share_of_program",
    "split_mean",
    "sum_per_channel",
    "tile_offsets",
    "values_before",
]

# Steps per turn of an unrolled loop: one step of bfloat16 has too few bytes in flight. Loops over
# float64 are not unrolled, because activations would spill registers.
UNROLL = tl.constexpr(2)


@triton.jit
def partial_of_program(partials, channel, channels):
    """Pointers to a program's first results in ``partials``, of shape (rows, channels, shares).

    It also returns the distance of a row from the next. The shares of a channel lie side by side,
    for the second kernel, which reads them all.
    """
    shares = tl.num_programs(1)
    row = tl.cast(channels, tl.int64) * shares
    return partials + tl.cast(channel, tl.int64) * shares + tl.program_id(1), row


@triton.jit
def share_of_program(share, tiles):
    """The tiles of a program of sums, from ``begin`` up to ``end``."""
    begin = tl.program_id(1) * share
    return begin, tl.minimum(begin + share, tiles)


@triton.jit
def place_of(
    tile, width, INDEX: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The row and the column at which a tile of this program's channels begins."""
    if PLANES:
        column_tiles = tl.cdiv(width, COLUMNS)
        column = tl.cast(tile % column_tiles, INDEX) * COLUMNS
        return tl.cast(tile // column_tiles, tl.int64) * ROWS, column
    else:
        return tl.cast(tile, tl.int64) * ROWS, tl.cast(tl.program_id(0), INDEX) * COLUMNS


@triton.jit
def next_place(row, column, width, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The row and the column at which the next tile begins, without a division."""
    if PLANES:
        column += COLUMNS
        is_last = column >= width
        return row + tl.where(is_last, ROWS, 0), tl.where(is_last, 0, column)
    else:
        return row + ROWS, column


@triton.jit
def values_before(
    tile, rows, width, INDEX: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """How many values of a channel lie in the tiles before ``tile``."""
    row, column = place_of(tile, width, INDEX, PLANES, ROWS, COLUMNS)
    count = tl.minimum(row, rows)
    if PLANES:
        count = count * width + tl.maximum(tl.minimum(rows - row, ROWS), 0) * column
    return count


@triton.jit
def tile_offsets(
    row, column, rows, width, stride, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The offsets and the mask of the tile that begins at a row and a column."""
    down, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    within = (down * stride.to(tl.int64))[:, None] + across[None, :]  # computed once for all tiles
    begin = row * stride + column
    if PLANES:
        begin += tl.program_id(0).to(tl.int64) * width
    rows_left = tl.maximum(tl.minimum(rows - row, ROWS), 0).to(tl.int32)
    columns_left = tl.minimum(width - column, COLUMNS).to(tl.int32)
    return within + begin, (down < rows_left)[:, None] & (across < columns_left)[None, :]


@triton.jit
def load_tile(
    x,
    row,
    column,
    rows,
    width,
    stride,
    other,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The values of a tile, with ``other`` beyond the edge."""
    offsets, mask = tile_offsets(row, column, rows, width, stride, PLANES, ROWS, COLUMNS)
    return tl.load(x + offsets, mask, other)


@triton.jit
def sum_per_channel(tile, PLANES: tl.constexpr):
    """The sums per channel: over the whole of a tile of planes, else over each column."""
    return tl.sum(tile) if PLANES else tl.sum(tile, 0)


@triton.jit
def any_channel(condition, PLANES: tl.constexpr):
    """Whether a condition holds for this program's channel, or any of its channels."""
    return condition if PLANES else tl.max(condition.to(tl.int32), 0) > 0


@triton.jit
def channels_of_program(COLUMNS: tl.constexpr, PLANES: tl.constexpr):
    """The channel of this program, or its channels, for sums."""
    if PLANES:
        return tl.program_id(0)
    else:
        return tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def split_mean(mean, channel, inside, COMPUTE_DTYPE: tl.constexpr):
    """A float64 mean in two parts: one of the compute dtype, to be subtracted, and the rest.

    A float32 mean of 1e3 may be 3e-5 wrong. The rest goes into the shift, which is added anyway.
    """
    exact = tl.load(mean + channel, inside, 0.0)
    mean_hi = exact.to(COMPUTE_DTYPE)
    return mean_hi, exact - mean_hi.to(tl.float64)


@triton.jit
def affine(invstd, weight, bias, mean_lo, channel, inside, COMPUTE_DTYPE: tl.constexpr):
    """Invstd and weight, the factors of ``x - mean_hi``, and the shift that the product needs."""
    inverse = tl.load(invstd + channel, inside, 0.0)
    factor = tl.zeros_like(inverse) + 1.0
    if weight is not None:
        factor = tl.load(weight + channel, inside, 0.0).to(tl.float64)
    shift = -mean_lo * inverse * factor
    if bias is not None:
        shift += tl.load(bias + channel, inside, 0.0).to(tl.float64)
    return inverse.to(COMPUTE_DTYPE), factor.to(COMPUTE_DTYPE), shift.to(COMPUTE_DTYPE)


@triton.jit
def multiple_of(length, ALIGN: tl.constexpr):
    """``length``, a multiple of ``ALIGN``.

    The compiler then knows that it is one, and loads as many values at once.
    """
    return length // ALIGN * ALIGN
