"""The sums of the backward pass in Triton, shared out to programs as the moments are: see cuda_moments.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .cuda_activation import NONE, activation_gradient
from .cuda_tiles import affine, channels_of_program, multiple_of, split_mean, sum_per_channel, tile_offsets

__all__ = ["backward_sums", "merge_sums"]


@triton.jit(do_not_specialize=["rows", "tiles", "share"])
def backward_sums(
    dy,
    x,
    y,
    dz,
    mean,
    invstd,
    weight,
    bias,
    partials,
    out,
    rows,
    width,
    stride,
    tiles,
    share,
    channels,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Sums of ``dz`` and of ``dz * (x - mean)`` of each program's tiles.

    ``dz`` is the gradient of the activation's input; without an activation it is ``dy``. It is stored where
    ``y``, the activation's output, is there; else the input is computed again from ``x``.
    ``partials``: (shares, 2, channels), float64; None where there is one share, and the result goes to
    ``out``, (2, channels).
    """
    width, stride = multiple_of(width, ALIGN), multiple_of(stride, ALIGN)
    channel = channels_of_program(COLUMNS, PLANES)
    inside = channel < channels
    mean_hi, mean_lo = split_mean(mean, channel, inside, COMPUTE_DTYPE)
    inverse, factor, shift = affine(invstd, weight, bias, mean_lo, channel, inside, COMPUTE_DTYPE)
    # Products of dy and x - mean may be beyond float32: these are in units of the standard deviation.
    unit = tl.where(inverse == 0, 1.0, inverse)
    sum_dy = tl.zeros([ROWS, COLUMNS], COMPUTE_DTYPE)
    sum_dy_xmu = tl.zeros([ROWS, COLUMNS], COMPUTE_DTYPE)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tiles)
    for tile in range(first, last):
        offsets, mask, _ = tile_offsets(tile, last, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
        gradient = tl.load(dy + offsets, mask, 0.0).to(COMPUTE_DTYPE)
        xmu = tl.load(x + offsets, mask, 0.0).to(COMPUTE_DTYPE) - mean_hi
        if ACTIVATION != NONE:
            if y is None:
                gradient = activation_gradient(gradient, xmu * inverse * factor + shift, ACTIVATION)
            else:
                gradient = activation_gradient(gradient, tl.load(y + offsets, mask, 0.0), ACTIVATION)
                tl.store(dz + offsets, gradient.to(dz.dtype.element_ty), mask)
        sum_dy += gradient
        sum_dy_xmu += tl.where(mask, gradient * (xmu * unit), 0.0)
    total_dy = sum_per_channel(sum_dy.to(tl.float64), PLANES)
    pointer = (out if partials is None else partials + tl.program_id(1) * 2 * channels) + channel
    tl.store(pointer, total_dy, inside)
    total_dy_xmu = sum_per_channel(sum_dy_xmu.to(tl.float64), PLANES) / unit.to(tl.float64)
    tl.store(pointer + channels, total_dy_xmu - mean_lo * total_dy, inside)


@triton.jit(do_not_specialize=["shares"])
def merge_sums(partials, out, shares, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over the first axis of ``partials``, (shares, length)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < length
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, shares, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < shares)[:, None] & inside[None, :]
        sums += tl.load(partials + row[:, None] * length + column[None, :], mask, 0.0)
    tl.store(out + column, tl.sum(sums, 0), inside)
