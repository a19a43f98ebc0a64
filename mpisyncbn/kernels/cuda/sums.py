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
    UNROLL,
    affine,
    channels_of_program,
    multiple_of,
    next_place,
    partial_of_program,
    place_of,
    share_of_program,
    split_mean,
    sum_per_channel,
    tile_offsets,
)

__all__ = ["backward_sums", "merge_sums", "parameter_gradients"]

SIDE_STAGES = tl.constexpr(3)  # tiles copied ahead to shared memory, where channels lie side by side


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

    They go to ``partials``, of shape (2, channels, shares), or to ``out`` if that is None.
    """
    width, stride = multiple_of(width, ALIGN), multiple_of(stride, ALIGN)
    channel = channels_of_program(COLUMNS, PLANES)
    inside = channel < channels
    mean_hi, mean_lo = split_mean(mean, channel, inside, COMPUTE_DTYPE)
    inverse, factor, shift = affine(invstd, weight, bias, mean_lo, channel, inside, COMPUTE_DTYPE)
    unit = _unit(inverse)
    factor = tl.where(inverse == 0, factor * 0.0, factor)
    sum_dy = tl.zeros([ROWS, COLUMNS], COMPUTE_DTYPE)
    sum_dy_xmu = tl.zeros([ROWS, COLUMNS], COMPUTE_DTYPE)
    begin, end = share_of_program(share, tiles)
    row, column = place_of(begin, width, INDEX, PLANES, ROWS, COLUMNS)
    stages: tl.constexpr = 1 if PLANES else SIDE_STAGES
    unroll: tl.constexpr = UNROLL if PLANES and COMPUTE_DTYPE == tl.float32 else 1
    for _ in tl.range(begin, end, num_stages=stages, loop_unroll_factor=unroll):
        offsets, mask = tile_offsets(row, column, rows, width, stride, PLANES, ROWS, COLUMNS)
        row, column = next_place(row, column, width, PLANES, ROWS, COLUMNS)
        gradient = tl.load(dy + offsets, mask, 0.0).to(COMPUTE_DTYPE)
        scaled = (tl.load(x + offsets, mask, 0.0).to(COMPUTE_DTYPE) - mean_hi) * unit
        z = scaled * factor + shift
        gradient = _through_activation(gradient, z, y, residual, dz, offsets, mask, KIND, PARAMETER)
        sum_dy += tl.where(mask, gradient, 0.0)
        sum_dy_xmu += tl.where(mask, gradient * scaled, 0.0)
    _store_sums(out, partials, sum_dy, sum_dy_xmu, mean, invstd, channel, channels, PLANES)


@triton.jit
def _store_sums(out, partials, sum_dy, sum_dy_xmu, mean, invstd, channel, channels, PLANES: tl.constexpr):
    inside = channel < channels
    total_dy = sum_per_channel(sum_dy.to(tl.float64), PLANES)
    total_dy_xmu = sum_per_channel(sum_dy_xmu.to(tl.float64), PLANES)
    # "volatile" makes the program read them again, because the loop has no registers to keep them.
    exact = tl.load(mean + channel, inside, 0.0, volatile=True)
    mean_lo = exact - exact.to(sum_dy.dtype).to(tl.float64)
    unit = _unit(tl.load(invstd + channel, inside, 0.0, volatile=True).to(sum_dy.dtype))
    total_dy_xmu = total_dy_xmu / unit.to(tl.float64) - mean_lo * total_dy
    if partials is None:
        tl.store(out + channel, total_dy, inside)
        tl.store(out + channels + channel, total_dy_xmu, inside)
    else:
        pointer, row = partial_of_program(partials, channel, channels)
        tl.store(pointer, total_dy, inside)
        tl.store(pointer + row, total_dy_xmu, inside)


@triton.jit(do_not_specialize=["shares"])
def merge_sums(partials, out, shares, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the sums over the last axis of ``partials``, of shape (length, shares)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < length
    pointer = partials + column.to(tl.int64)[None, :] * shares
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, shares, ROWS):
        share = begin + tl.arange(0, ROWS)[:, None]
        sums += tl.load(pointer + share, (share < shares) & inside[None, :], 0.0)
    tl.store(out + column, tl.sum(sums, 0), inside)


@triton.jit(do_not_specialize=["channels"])
def parameter_gradients(sums, invstd, dweight, dbias, channels, COLUMNS: tl.constexpr):
    """Store the gradients of weight and bias, where given, from this rank's sums."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    if dweight is not None:
        found = tl.load(sums + channels + channel, inside, 0.0) * tl.load(invstd + channel, inside, 0.0)
        tl.store(dweight + channel, found.to(dweight.dtype.element_ty), inside)
    if dbias is not None:
        tl.store(dbias + channel, tl.load(sums + channel, inside, 0.0).to(dbias.dtype.element_ty), inside)


@triton.jit
def _unit(inverse):
    """The factor of ``x - mean`` that keeps products in the range of float32."""
    return tl.where(inverse == 0, 1.0, inverse)


@triton.jit
def _through_activation(dy, z, y, residual, dz, offsets, mask, KIND: tl.constexpr, PARAMETER: tl.constexpr):
    """The gradient of the activation's input. ``z`` is that input without the residual."""
    if residual is not None:
        z += tl.load(residual + offsets, mask, 0.0).to(z.dtype)
    if y is not None:
        z = tl.load(y + offsets, mask, 0.0).to(z.dtype)
    dy = activation_gradient(dy, z, KIND, PARAMETER)
    if dz is not None:
        rounded = dy.to(dz.dtype.element_ty)
        tl.store(dz + offsets, rounded, mask)
        # The sums are those of the stored values, so that the mean of dx is 0 even after rounding.
        dy = rounded.to(z.dtype)
    return dy
