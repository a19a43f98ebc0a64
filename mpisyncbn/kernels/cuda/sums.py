"""The sums of the backward pass in Triton, shared out to programs as in moments.py.

They are the sums of ``dz``, the gradient of the activation's input (without an activation that is
``dy``), and of ``dz * (x - mean)``. The activation's input is computed again from ``x`` and the
residual, unless ``y``, the activation's output, is given. ``dz`` is stored if it is not None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activation_gradient
from .tiles import (
    affine,
    channels_of_program,
    multiple_of,
    share_of_program,
    split_mean,
    sum_per_channel,
    tile_offsets,
)

__all__ = ["backward_sums", "merge_sums"]


@triton.jit(do_not_specialize=["rows", "tiles", "share"])
def backward_sums(
    dy,
    x,
    y,
    residual,
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
    KIND: tl.constexpr,
    PARAMETER: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Store both sums of each program's tiles.

    They go to ``partials``, of shape (shares, 2, channels), or to ``out`` if that is None.
    """
    width, stride = multiple_of(width, ALIGN), multiple_of(stride, ALIGN)
    channel = channels_of_program(COLUMNS, PLANES)
    inside = channel < channels
    mean_hi, mean_lo = split_mean(mean, channel, inside, COMPUTE_DTYPE)
    inverse, factor, shift = affine(invstd, weight, bias, mean_lo, channel, inside, COMPUTE_DTYPE)
    unit = tl.where(inverse == 0, 1.0, inverse)  # keeps products in the range of float32
    sum_dy = tl.zeros([ROWS, COLUMNS], COMPUTE_DTYPE)
    sum_dy_xmu = tl.zeros([ROWS, COLUMNS], COMPUTE_DTYPE)
    begin, end = share_of_program(share, tiles)
    for tile in range(begin, end):
        offsets, mask, _ = tile_offsets(tile, end, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
        gradient = tl.load(dy + offsets, mask, 0.0).to(COMPUTE_DTYPE)
        xmu = tl.load(x + offsets, mask, 0.0).to(COMPUTE_DTYPE) - mean_hi
        z = xmu * inverse * factor + shift
        gradient = _through_activation(gradient, z, y, residual, dz, offsets, mask, KIND, PARAMETER)
        sum_dy += gradient
        sum_dy_xmu += tl.where(mask, gradient * (xmu * unit), 0.0)
    total_dy = sum_per_channel(sum_dy.to(tl.float64), PLANES)
    pointer = (out if partials is None else partials + tl.program_id(1) * 2 * channels) + channel
    tl.store(pointer, total_dy, inside)
    total_dy_xmu = sum_per_channel(sum_dy_xmu.to(tl.float64), PLANES) / unit.to(tl.float64)
    tl.store(pointer + channels, total_dy_xmu - mean_lo * total_dy, inside)


@triton.jit(do_not_specialize=["shares"])
def merge_sums(partials, out, shares, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the sums over the first axis of ``partials``, of shape (shares, length)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < length
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, shares, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < shares)[:, None] & inside[None, :]
        sums += tl.load(partials + row[:, None] * length + column[None, :], mask, 0.0)
    tl.store(out + column, tl.sum(sums, 0), inside)


@triton.jit
def _through_activation(dy, z, y, residual, dz, offsets, mask, KIND: tl.constexpr, PARAMETER: tl.constexpr):
    """The gradient of the activation's input. ``z`` is that input without the residual."""
    if residual is not None:
        z += tl.load(residual + offsets, mask, 0.0).to(z.dtype)
    if y is not None:
        z = tl.load(y + offsets, mask, 0.0).to(z.dtype)
    dy = activation_gradient(dy, z, KIND, PARAMETER)
    if dz is not None:
        tl.store(dz + offsets, dy.to(dz.dtype.element_ty), mask)
    return dy
