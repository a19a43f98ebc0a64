"""Element-wise work in Triton, by many small programs that follow the order of memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import NONE, activate, activation_gradient
from .tiles import affine, multiple_of, split_mean

__all__ = ["backward_elementwise", "normalize"]


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def normalize(
    x,
    residual,
    y,
    mean,
    invstd,
    weight,
    bias,
    rows,
    width,
    stride,
    channels,
    column_tiles,
    KIND: tl.constexpr,
    PARAMETER: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Store ``y``, the activation of ``(x - mean) * invstd * weight + bias + residual``.

    Grid: one program for each tile of ``STEPS`` times ``ROWS`` rows.
    """
    width, stride = multiple_of(width, ALIGN), multiple_of(stride, ALIGN)
    channel, inside = _channels_of_columns(width, channels, column_tiles, INDEX, PLANES, COLUMNS)
    mean_hi, mean_lo = split_mean(mean, channel, inside, COMPUTE_DTYPE)
    inverse, factor, shift = affine(invstd, weight, bias, mean_lo, channel, inside, COMPUTE_DTYPE)
    for step in tl.static_range(STEPS):
        offsets, mask = _element_offsets(
            step, rows, width, stride, channels, column_tiles, INDEX, PLANES, STEPS, ROWS, COLUMNS
        )
        found = (tl.load(x + offsets, mask, 0.0).to(COMPUTE_DTYPE) - mean_hi) * inverse * factor + shift
        if residual is not None:
            found += tl.load(residual + offsets, mask, 0.0).to(COMPUTE_DTYPE)
        found = activate(found, KIND, PARAMETER)
        tl.store(y + offsets, found.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def backward_elementwise(
    dz,
    x,
    dx,
    mean,
    invstd,
    weight,
    bias,
    mean_dy,
    mean_dy_xmu,
    rows,
    width,
    stride,
    channels,
    column_tiles,
    KIND: tl.constexpr,
    PARAMETER: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Store ``dx = (dz - mean_dy - (x - mean) * invstd**2 * mean_dy_xmu) * invstd * weight``.

    ``dz`` is still the gradient of the activation's output, unless its ``KIND`` is NONE. The grid
    is that of ``normalize``.
    """
    width, stride = multiple_of(width, ALIGN), multiple_of(stride, ALIGN)
    channel, inside = _channels_of_columns(width, channels, column_tiles, INDEX, PLANES, COLUMNS)
    mean_hi, mean_lo = split_mean(mean, channel, inside, COMPUTE_DTYPE)
    inverse, factor, shift = affine(invstd, weight, bias, mean_lo, channel, inside, COMPUTE_DTYPE)
    wide_invstd = tl.load(invstd + channel, inside, 0.0)
    slope = wide_invstd * tl.load(mean_dy_xmu + channel, inside, 0.0)
    mean_dy_hi, mean_dy_lo = split_mean(mean_dy, channel, inside, COMPUTE_DTYPE)
    mean_dy_lo = (mean_dy_lo - mean_lo * wide_invstd * slope).to(COMPUTE_DTYPE)
    slope = slope.to(COMPUTE_DTYPE)
    for step in tl.static_range(STEPS):
        offsets, mask = _element_offsets(
            step, rows, width, stride, channels, column_tiles, INDEX, PLANES, STEPS, ROWS, COLUMNS
        )
        xmu = tl.load(x + offsets, mask, 0.0).to(COMPUTE_DTYPE) - mean_hi
        found = tl.load(dz + offsets, mask, 0.0).to(COMPUTE_DTYPE)
        if KIND != NONE:
            found = activation_gradient(found, xmu * inverse * factor + shift, KIND, PARAMETER)
        found = (((found - mean_dy_hi) - xmu * inverse * slope) - mean_dy_lo) * factor * inverse
        tl.store(dx + offsets, found.to(dx.dtype.element_ty), mask)


@triton.jit
def _channels_of_columns(
    width, channels, column_tiles, INDEX: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr
):
    """The channel of an element-wise program, or the channels of its columns, and a mask.

    Channels of columns have the shape to broadcast over rows.
    """
    tile = tl.program_id(0)
    if PLANES:
        channel = (tile // column_tiles) % channels
        return channel, channel < channels
    else:
        column = tl.cast(tile % column_tiles, INDEX) * COLUMNS + tl.arange(0, COLUMNS)
        return column[None, :], (column < width)[None, :]


@triton.jit
def _element_offsets(
    step,
    rows,
    width,
    stride,
    channels,
    column_tiles,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The offsets and the mask of a tile. Programs follow the order of memory."""
    tile = tl.program_id(0)
    block = tile // column_tiles
    column = tl.cast(tile % column_tiles, INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    base = tl.zeros([], tl.int64)
    if PLANES:
        base = (block % channels).to(tl.int64) * width
        block = block // channels
    row = (block.to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
    return (base + row * stride)[:, None] + column[None, :], (row < rows)[:, None] & (column < width)[None, :]
