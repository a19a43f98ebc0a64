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
    "affine",
    "any_channel",
    "channels_of_program",
    "load_tile",
    "multiple_of",
    "share_of_program",
    "split_mean",
    "sum_per_channel",
    "tile_offsets",
]


@triton.jit
def share_of_program(share, tiles):
    """The tiles of a program of sums, from ``begin`` up to ``end``."""
    begin = tl.program_id(1) * share
    return begin, tl.minimum(begin + share, tiles)


@triton.jit
def tile_offsets(
    tile,
    end,
    rows,
    width,
    stride,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The offsets, mask and number of values per channel of a tile of this program's channels.

    The mask is empty for a tile from ``end`` on.
    """
    rows = tl.where(tile < end, rows, 0)
    if PLANES:
        column_tiles = tl.cdiv(width, COLUMNS)
        row = tl.cast(tile // column_tiles, tl.int64) * ROWS
        column = tl.cast(tile % column_tiles, INDEX) * COLUMNS
        base = tl.program_id(0).to(tl.int64) * width
        count = tl.maximum(tl.minimum(rows - row, ROWS), 0) * tl.minimum(width - column, COLUMNS)
    else:
        row = tl.cast(tile, tl.int64) * ROWS
        column = tl.cast(tl.program_id(0), INDEX) * COLUMNS
        base = tl.zeros([], tl.int64)
        count = tl.maximum(tl.minimum(rows - row, ROWS), 0)
    row += tl.arange(0, ROWS)
    column += tl.arange(0, COLUMNS)
    offsets = (base + row * stride)[:, None] + column[None, :]
    return offsets, (row < rows)[:, None] & (column < width)[None, :], count


@triton.jit
def load_tile(
    x,
    tile,
    end,
    rows,
    width,
    stride,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The values of a tile, and its mask and number of values per channel from ``tile_offsets``."""
    offsets, mask, count = tile_offsets(tile, end, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
    return tl.load(x + offsets, mask, 0.0), mask, count


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
