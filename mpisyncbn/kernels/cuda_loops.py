"""The loops of cuda.py, in Triton.

A tensor without gaps is read as a matrix, in tiles of ``ROWS`` by ``COLUMNS`` values. Of a contiguous
``(N, C, *)`` one row is one plane, the ``width`` values of a sample's channel (``PLANES``); with the
channels side by side, one row has a value of each of ``width`` channels.

Sums: a program takes some tiles of one channel (of a block of channels where they are side by side) and adds
them up place by place, in ``WIDE``, float32 or, for float64, that; few enough of them that float32 keeps its
digits. What the programs of one channel found is put together in float64 and in a fixed order by a
second kernel, so the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "backward_elementwise",
    "backward_sums",
    "enter_batch",
    "merge_moments",
    "merge_sums",
    "moments",
    "normalize",
]


@triton.jit(do_not_specialize=["rows", "tiles", "share"])
def moments(
    x,
    parts,
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
    WIDE: tl.constexpr,
    ONE: tl.constexpr,
):
    """Of each program's tiles: a value near the mean, what is missing to the mean, M2 and the count.

    ``ONE``: each channel is a single tile.
    Grid: (channels or blocks of them, shares of tiles). ``parts``: (shares, 4, channels), float64; None where
    there is one share, and the result goes to ``out``, see merge_moments.
    """
    width, stride = _multiple(width, ALIGN), _multiple(stride, ALIGN)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tiles)
    values, mask, count = _tile(x, first, last, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
    # Squares of distances from a value near the mean lose no digits.
    near = (_down(values.to(tl.float64), PLANES) * (1.0 / count.to(tl.float64))).to(WIDE)
    rest, m2, total = _about(
        x,
        near,
        1.0,
        values,
        mask,
        count,
        first + 1,
        last,
        rows,
        width,
        stride,
        ONE,
        INDEX,
        PLANES,
        ROWS,
        COLUMNS,
        WIDE,
    )
    far = rest * rest * total > 4 * m2
    # Where the first tile was not typical of the others, once more, about the mean.
    if not ONE and _any(far, PLANES):
        near = tl.where(far, near + rest.to(WIDE), near)
        values, mask, count = _tile(x, first, last, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
        rest, m2, total = _about(
            x,
            near,
            1.0,
            values,
            mask,
            count,
            first + 1,
            last,
            rows,
            width,
            stride,
            ONE,
            INDEX,
            PLANES,
            ROWS,
            COLUMNS,
            WIDE,
        )
    if WIDE == tl.float32:
        # Squares below 1e-30 may have lost digits, those above 1e30 be infinite: once more, in other units.
        beyond = (m2 < total * 2.0**-100) | ~(m2 <= total * 2.0**100)
        if _any(beyond, PLANES):
            unit = tl.where(m2 < total, 2.0**90, 2.0**-90)
            unit = tl.where(beyond, unit, 1.0).to(WIDE)
            values, mask, count = _tile(x, first, last, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
            rest, m2, total = _about(
                x,
                near,
                unit,
                values,
                mask,
                count,
                first + 1,
                last,
                rows,
                width,
                stride,
                ONE,
                INDEX,
                PLANES,
                ROWS,
                COLUMNS,
                WIDE,
            )
            per = 1.0 / unit.to(tl.float64)
            rest, m2 = rest * per, m2 * per * per
    near = near.to(tl.float64)
    m2 = tl.where(m2 < 0, 0.0, m2)
    channel = _channel(COLUMNS, PLANES)
    inside = channel < channels
    if parts is None:
        _store_moments(out, near, rest, m2, channel, channels, WIDE == tl.float64)
    else:
        at = parts + tl.program_id(1) * 4 * channels + channel
        tl.store(at, near, inside)
        tl.store(at + channels, rest, inside)
        tl.store(at + 2 * channels, m2, inside)
        tl.store(at + 3 * channels, tl.zeros_like(rest) + total, inside)


@triton.jit(do_not_specialize=["shares"])
def merge_moments(
    parts, out, shares, channels, SPLIT_MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Mean and M2 of all parts of a channel (Chan, Golub and LeVeque 1979, eq. 2.1).

    ``out``: (2, channels); with ``SPLIT_MEAN`` (3, channels), the mean in two rows.
    """
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    # Means as distances from one of them: small numbers, which keep their digits.
    origin = tl.load(parts + channel, inside, 0.0)
    counts = tl.zeros([ROWS, COLUMNS], tl.float64)
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, shares, ROWS):
        count, distance, _ = _part(parts, origin, begin, channel, shares, channels, ROWS)
        counts += count
        sums += count * distance
    total = tl.sum(counts, 0)
    mean = tl.sum(sums, 0) / tl.where(inside, total, 1.0)
    squares = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, shares, ROWS):
        count, distance, m2 = _part(parts, origin, begin, channel, shares, channels, ROWS)
        distance -= mean[None, :]
        squares += m2 + count * distance * distance
    _store_moments(out, origin, mean, tl.sum(squares, 0), channel, channels, SPLIT_MEAN)


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
    parts,
    out,
    rows,
    width,
    stride,
    tiles,
    share,
    channels,
    GATE: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of each program's tiles: the sums of ``dy`` and of ``dy * (x - mean)``.

    With ``GATE`` of what comes through the ReLU: where ``y`` is positive, then also stored as ``dz``;
    without ``y``, where the normalized ``x`` is. ``parts``: (shares, 2, channels), float64; None where there
    is one share, and the result goes to ``out``, (2, channels).
    """
    width, stride = _multiple(width, ALIGN), _multiple(stride, ALIGN)
    channel = _channel(COLUMNS, PLANES)
    inside = channel < channels
    high, rest = _center(mean, channel, inside, WIDE)
    inverse, factor, shift = _affine(invstd, weight, bias, rest, channel, inside, WIDE)
    # Products of dy and x - mean may be beyond float32: these are in units of the standard deviation.
    unit = tl.where(inverse == 0, 1.0, inverse)
    sum_dy = tl.zeros([ROWS, COLUMNS], WIDE)
    sum_dy_xmu = tl.zeros([ROWS, COLUMNS], WIDE)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tiles)
    for tile in range(first, last):
        offsets, mask, _ = _place(tile, last, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
        slope = tl.load(dy + offsets, mask, 0.0).to(WIDE)
        xmu = tl.load(x + offsets, mask, 0.0).to(WIDE) - high
        if GATE:
            if y is None:
                closed = xmu * inverse * factor + shift <= 0
            else:
                closed = tl.load(y + offsets, mask, 0.0) <= 0
            slope = tl.where(closed, 0.0, slope)
            if y is not None:
                tl.store(dz + offsets, slope.to(dz.dtype.element_ty), mask)
        sum_dy += slope
        sum_dy_xmu += tl.where(mask, slope * (xmu * unit), 0.0)
    total_dy = _down(sum_dy.to(tl.float64), PLANES)
    at = (out if parts is None else parts + tl.program_id(1) * 2 * channels) + channel
    tl.store(at, total_dy, inside)
    total_dy_xmu = _down(sum_dy_xmu.to(tl.float64), PLANES) / unit.to(tl.float64)
    tl.store(at + channels, total_dy_xmu - rest * total_dy, inside)


@triton.jit(do_not_specialize=["shares"])
def merge_sums(parts, out, shares, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over the first of two axes, ``parts``: (shares, length)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < length
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, shares, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < shares)[:, None] & inside[None, :]
        sums += tl.load(parts + row[:, None] * length + column[None, :], mask, 0.0)
    tl.store(out + column, tl.sum(sums, 0), inside)


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
    RELU: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``y = (x - mean) * invstd * weight + bias``, and the residual, and the ReLU.

    Grid: the tiles, each of ``STEPS`` times ``ROWS`` rows.
    """
    width, stride = _multiple(width, ALIGN), _multiple(stride, ALIGN)
    channel, inside = _channels(width, channels, column_tiles, INDEX, PLANES, COLUMNS)
    high, rest = _center(mean, channel, inside, WIDE)
    inverse, factor, shift = _affine(invstd, weight, bias, rest, channel, inside, WIDE)
    for step in tl.static_range(STEPS):
        offsets, mask = _elements(
            step, rows, width, stride, channels, column_tiles, INDEX, PLANES, STEPS, ROWS, COLUMNS
        )
        found = (tl.load(x + offsets, mask, 0.0).to(WIDE) - high) * inverse * factor + shift
        if residual is not None:
            found += tl.load(residual + offsets, mask, 0.0).to(WIDE)
        if RELU:
            found = tl.where(found <= 0, 0.0, found)
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
    GATE: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``dx = (dz - mean_dy - (x - mean) * invstd**2 * mean_dy_xmu) * invstd * weight``.

    With ``GATE``, ``dz`` is still what came into the ReLU. Grid: as that of ``normalize``.
    """
    width, stride = _multiple(width, ALIGN), _multiple(stride, ALIGN)
    channel, inside = _channels(width, channels, column_tiles, INDEX, PLANES, COLUMNS)
    high, rest = _center(mean, channel, inside, WIDE)
    inverse, factor, shift = _affine(invstd, weight, bias, rest, channel, inside, WIDE)
    exact = tl.load(invstd + channel, inside, 0.0)
    slope = exact * tl.load(mean_dy_xmu + channel, inside, 0.0)
    high_dy, rest_dy = _center(mean_dy, channel, inside, WIDE)
    rest_dy = (rest_dy - rest * exact * slope).to(WIDE)
    slope = slope.to(WIDE)
    for step in tl.static_range(STEPS):
        offsets, mask = _elements(
            step, rows, width, stride, channels, column_tiles, INDEX, PLANES, STEPS, ROWS, COLUMNS
        )
        xmu = tl.load(x + offsets, mask, 0.0).to(WIDE) - high
        found = tl.load(dz + offsets, mask, 0.0).to(WIDE)
        if GATE:
            found = tl.where(xmu * inverse * factor + shift <= 0, 0.0, found)
        found = (((found - high_dy) - xmu * inverse * slope) - rest_dy) * factor * inverse
        tl.store(dx + offsets, found.to(dx.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["channels", "to_unbiased", "momentum"])
def enter_batch(
    running_mean, running_var, batches, mean, var, channels, to_unbiased, momentum, COLUMNS: tl.constexpr
):
    """The running statistics moved towards those of a batch, and one more in ``batches``, if it is not None.

    ``to_unbiased``, ``momentum``: the bits of float64 numbers.
    """
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    _blend(running_mean, tl.load(mean + channel, inside, 0.0), momentum, channel, inside)
    unbiased = tl.load(var + channel, inside, 0.0) * _number(to_unbiased)
    _blend(running_var, unbiased, momentum, channel, inside)
    if batches is not None:
        tl.store(batches, tl.load(batches) + 1, tl.program_id(0) == 0)


@triton.jit
def _blend(running, new, momentum, channel, inside):
    old = tl.load(running + channel, inside, 0.0).to(tl.float64)
    weight, step = _number(momentum), new - old
    # from the nearer end, as torch.lerp: a momentum of 1 gives the batch
    blended = tl.where(weight < 0.5, old + weight * step, new - (1 - weight) * step)
    if running.dtype.element_ty != tl.float64:
        blended = blended.to(tl.float32)  # as torch does it on the way to half precision
    tl.store(running + channel, blended.to(running.dtype.element_ty), inside)


@triton.jit
def _number(bits):
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)


@triton.jit
def _place(
    tile,
    last,
    rows,
    width,
    stride,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Offsets, mask and number of values per channel of a tile of this program's channels.

    Nothing of a tile that is beyond the ``last``.
    """
    rows = tl.where(tile < last, rows, 0)
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
def _tile(
    x,
    tile,
    last,
    rows,
    width,
    stride,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    offsets, mask, count = _place(tile, last, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
    return tl.load(x + offsets, mask, 0.0), mask, count


@triton.jit
def _about(
    x,
    near,
    unit,
    values,
    mask,
    count,
    first,
    last,
    rows,
    width,
    stride,
    ONE: tl.constexpr,
    INDEX: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean of ``(x - near) * unit``, M2, and the count, of a tile that is there and those up to ``last``.

    In float64. ``unit`` is a power of two.
    """
    sums = tl.where(mask, values.to(WIDE) - near, 0.0) * unit
    squares = sums * sums
    total = count.to(tl.int64)
    if not ONE:
        for tile in range(first, last, 2):
            # both are loaded before either is used: memory answers late
            values, mask, count = _tile(x, tile, last, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS)
            more, more_mask, more_count = _tile(
                x, tile + 1, last, rows, width, stride, INDEX, PLANES, ROWS, COLUMNS
            )
            distance = tl.where(mask, values.to(WIDE) - near, 0.0) * unit
            sums += distance
            squares += distance * distance
            distance = tl.where(more_mask, more.to(WIDE) - near, 0.0) * unit
            sums += distance
            squares += distance * distance
            total += count + more_count
    total = total.to(tl.float64)
    found = _down(sums.to(tl.float64), PLANES)
    rest = found * (1.0 / total)
    return rest, _down(squares.to(tl.float64), PLANES) - found * rest, total


@triton.jit
def _down(tile, PLANES: tl.constexpr):
    """Sums per channel: of all of a tile of planes, else of its columns."""
    return tl.sum(tile) if PLANES else tl.sum(tile, 0)


@triton.jit
def _any(condition, PLANES: tl.constexpr):
    return condition if PLANES else tl.max(condition.to(tl.int32), 0) > 0


@triton.jit
def _channel(COLUMNS: tl.constexpr, PLANES: tl.constexpr):
    """The channel of this program, or its channels, for sums."""
    if PLANES:
        return tl.program_id(0)
    else:
        return tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _channels(
    width, channels, column_tiles, INDEX: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr
):
    """The channel of an element-wise program, or those of its columns in the shape to broadcast; a mask."""
    tile = tl.program_id(0)
    if PLANES:
        channel = (tile // column_tiles) % channels
        return channel, channel < channels
    else:
        column = tl.cast(tile % column_tiles, INDEX) * COLUMNS + tl.arange(0, COLUMNS)
        return column[None, :], (column < width)[None, :]


@triton.jit
def _elements(
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
    """Offsets and mask of a tile of an element-wise program: one program after the other, as in memory."""
    tile = tl.program_id(0)
    block = tile // column_tiles
    column = tl.cast(tile % column_tiles, INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    base = tl.zeros([], tl.int64)
    if PLANES:
        base = (block % channels).to(tl.int64) * width
        block = block // channels
    row = (block.to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
    return (base + row * stride)[:, None] + column[None, :], (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def _store_moments(out, near, rest, m2, channel, channels, SPLIT_MEAN: tl.constexpr):
    inside = channel < channels
    if SPLIT_MEAN:
        tl.store(out + channel, near, inside)
        tl.store(out + channels + channel, rest, inside)
        tl.store(out + 2 * channels + channel, m2, inside)
    else:
        tl.store(out + channel, near + rest, inside)
        tl.store(out + channels + channel, m2, inside)


@triton.jit
def _part(parts, origin, begin, channel, shares, channels, ROWS: tl.constexpr):
    """Counts, distances of the means from ``origin``, and M2 of ``ROWS`` parts; nothing beyond the last."""
    row = begin + tl.arange(0, ROWS)
    mask = (row < shares)[:, None] & (channel < channels)[None, :]
    at = parts + row[:, None] * 4 * channels + channel[None, :]
    near, rest = tl.load(at, mask, 0.0), tl.load(at + channels, mask, 0.0)
    m2, count = tl.load(at + 2 * channels, mask, 0.0), tl.load(at + 3 * channels, mask, 0.0)
    return count, tl.where(mask, (near - origin[None, :]) + rest, 0.0), m2


@triton.jit
def _center(mean, channel, inside, WIDE: tl.constexpr):
    """A float64 mean as a number of the working dtype, to be subtracted, and the rest in float64.

    A float32 mean of 1e3 is 3e-5 wrong: what it misses goes into what is added later anyway.
    """
    exact = tl.load(mean + channel, inside, 0.0)
    high = exact.to(WIDE)
    return high, exact - high.to(tl.float64)


@triton.jit
def _affine(invstd, weight, bias, rest, channel, inside, WIDE: tl.constexpr):
    """What ``x - high`` is multiplied by, first invstd and then the weight, and what is added then."""
    inverse = tl.load(invstd + channel, inside, 0.0)
    factor = tl.zeros_like(inverse) + 1.0
    if weight is not None:
        factor = tl.load(weight + channel, inside, 0.0).to(tl.float64)
    shift = -rest * inverse * factor
    if bias is not None:
        shift += tl.load(bias + channel, inside, 0.0).to(tl.float64)
    return inverse.to(WIDE), factor.to(WIDE), shift.to(WIDE)


@triton.jit
def _multiple(length, ALIGN: tl.constexpr):
    """A length that is known to be a multiple of ``ALIGN``, so that as many values may be loaded at once."""
    return length // ALIGN * ALIGN
