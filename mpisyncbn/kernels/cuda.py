"""The four verbs for torch tensors on a GPU, by the Triton kernels of cuda_loops.py.

The other vectors come and go in float64, on the device of ``x``. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cuda_loops
from .layout import dense, like

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]

# Sums: few large programs, because what they find has to be put together.
_WARPS = 16
_BYTES = 32 * _WARPS * 32  # in a tile of a program: two loads of 16 bytes for each of its threads
_UNROLL = 2  # tiles that a program has under way: memory answers late
_PROGRAMS = 2  # for each multiprocessor
_LONGEST = 64  # tiles in a share: float32 keeps its digits in a sum as long
_SHORTEST = 4  # tiles in a share, but for the last: less is not worth a second kernel
_MOST_SHARES = 65535  # what CUDA lets a grid's second axis count
_LINE = 128  # bytes side by side in a tile of channels: a cache line
# Their merging: the same number of values again, but of float64 vectors.
_PARTS, _PART_COLUMNS = 64, 16
# Element by element: many small programs.
_SMALL_WARPS = 4
_SMALL_BYTES = 32 * _SMALL_WARPS * 64
_MOST_ROWS = 16
_SMALL = {"num_warps": _SMALL_WARPS, "enable_fp_fusion": True}
_STEPS = 4  # tiles one below the other for each program: it loads the vectors once


def local_moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    channels, exact = x.shape[1], x.dtype == torch.float64
    found = _sums_of(x, 3 if exact else 2)
    if x.numel():
        x, plan = _planned(x)
        parts = _parts_of(x, plan, 4)
        with _device_of(x):
            cuda_loops.moments[plan.grid](x, parts, found, *plan.sizes, **plan.options)
            if parts is not None:
                cuda_loops.merge_moments[(triton.cdiv(channels, _PART_COLUMNS),)](
                    parts, found, plan.shares, channels, exact, _PARTS, _PART_COLUMNS, **_SMALL
                )
    return x.numel() // channels, found[:2] if exact else found[0], found[-1]


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel():
        residual = None if residual is None else like(residual, x)
        mean, invstd, weight, bias = map(_vector, (mean, invstd, weight, bias))
        grid, sizes, options = _small_plan(*_matrix(x), x.dtype)
        with _device_of(x):
            cuda_loops.normalize[grid](
                x, residual, y, mean, invstd, weight, bias, *sizes, RELU=relu, **options
            )
    return y


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, gate: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    found = _sums_of(x, 2)
    weight, bias, y = gate or (None, None, None)
    dz = dy
    if x.numel():
        x, plan = _planned(x)
        dy = dz = like(dy, x)
        mean, invstd, weight, bias = map(_vector, (mean, invstd, weight, bias))
        if y is not None:
            y, dz = like(y, x), torch.empty_like(x)
        parts = _parts_of(x, plan, 2)
        with _device_of(x):
            cuda_loops.backward_sums[plan.grid](
                dy,
                x,
                y,
                None if y is None else dz,
                mean,
                invstd,
                weight,
                bias,
                parts,
                found,
                *plan.sizes,
                GATE=gate is not None,
                **_sums_options(plan, y),
            )
            if parts is not None:
                cuda_loops.merge_sums[(triton.cdiv(2 * channels, _PART_COLUMNS),)](
                    parts, found, plan.shares, 2 * channels, _PARTS, _PART_COLUMNS, **_SMALL
                )
    return found[0], found[1], dz


def backward_elementwise(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xmu: Tensor,
    gate: Any = None,
) -> Tensor:
    x = dense(x)
    dx = torch.empty_like(x)
    relu = gate is not None and gate.y is None
    if x.numel():
        grid, sizes, options = _small_plan(*_matrix(x), x.dtype)
        vectors = mean, invstd, weight, gate.bias if relu else None, mean_dy, mean_dy_xmu
        with _device_of(x):
            cuda_loops.backward_elementwise[grid](
                like(dz, x),
                x,
                dx,
                *map(_vector, vectors),
                *sizes,
                GATE=relu,
                **options,
            )
    return dx


def _sums_of(x: Tensor, rows: int) -> Tensor:
    """Memory for sums over ``x``: zeros where it is empty."""
    make = x.new_empty if x.numel() else x.new_zeros
    return make((rows, x.shape[1]), dtype=torch.float64)


def try_out(device: torch.device) -> None:
    """Raises where Triton cannot start a kernel: it needs a C compiler, and a driver that knows its code."""
    ones = torch.ones((1, 1), dtype=torch.float64, device=device)
    with _device_of(ones):
        cuda_loops.merge_sums[(1,)](ones, torch.empty_like(ones), 1, 1, _PARTS, _PART_COLUMNS, **_SMALL)


class _Sums(NamedTuple):
    """How the tiles of a tensor are shared out to programs that add them up, see cuda_loops.py."""

    shares: int
    grid: tuple[int, int]
    sizes: tuple[int, ...]
    options: dict[str, Any]


def _parts_of(x: Tensor, plan: _Sums, rows: int) -> Tensor | None:
    """Memory for what each program finds; None where one finds all."""
    return x.new_empty((plan.shares, rows, x.shape[1]), dtype=torch.float64) if plan.shares > 1 else None


def _sums_options(plan: _Sums, y: Any) -> dict[str, Any]:
    """Of backward_sums: with a third tensor to read, registers are for one tile at a time."""
    return plan.options if y is None else plan.options | {"UNROLL": 1}


def _planned(x: Tensor) -> tuple[Tensor, _Sums]:
    x = dense(x)
    return x, _sums_plan(*_matrix(x), x.dtype, _multiprocessors(x.device))


@lru_cache(maxsize=4096)
def _sums_plan(samples: int, channels: int, length: int, dtype: torch.dtype, multiprocessors: int) -> _Sums:
    planes = length > 1
    width = length if planes else channels
    values = _BYTES // dtype.itemsize
    rows, columns = _tile(samples, width, values) if planes else _lines(samples, width, values, dtype)
    down, across = triton.cdiv(samples, rows), triton.cdiv(width, columns)
    tiles, blocks = (down * across, channels) if planes else (down, across)
    wanted = max(1, _PROGRAMS * multiprocessors // blocks)
    share = min(max(triton.cdiv(tiles, wanted), _SHORTEST), _LONGEST)
    share = max(share, triton.cdiv(tiles, _MOST_SHARES))
    shares = triton.cdiv(tiles, share)
    sizes = samples, width, channels * length, tiles, share, channels
    options = _options(planes, width, rows, columns, dtype, _WARPS) | {"UNROLL": _UNROLL}
    return _Sums(shares, (blocks, shares), sizes, options)


@lru_cache(maxsize=4096)
def _small_plan(
    samples: int, channels: int, length: int, dtype: torch.dtype
) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    planes = length > 1
    matrix = (samples * channels, length) if planes else (samples, channels)
    values = _SMALL_BYTES // dtype.itemsize
    rows, columns = _tile(*matrix, values) if planes else _lines(*matrix, values, dtype)
    if planes:  # each row of a tile is of another channel, whose vectors take registers
        rows = min(rows, _MOST_ROWS)
    # Narrow tiles are high ones already.
    steps = 1 if planes or columns < 16 else min(_STEPS, triton.cdiv(matrix[0], rows))
    across = triton.cdiv(matrix[1], columns)
    grid = (triton.cdiv(matrix[0], rows * steps) * across,)
    options = _options(planes, matrix[1], rows, columns, dtype, _SMALL_WARPS) | {"STEPS": steps}
    return grid, (*matrix, channels, across), options


def _options(
    planes: bool, width: int, rows: int, columns: int, dtype: torch.dtype, warps: int
) -> dict[str, Any]:
    return {
        "ALIGN": math.gcd(width, 16),
        "PLANES": planes,
        "ROWS": rows,
        "COLUMNS": columns,
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": min(warps, max(1, rows * columns // 256)),  # of 32 threads, eight values each
        "enable_fp_fusion": True,
    }


def _tile(rows: int, width: int, values: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of tiles of about ``values`` values of a matrix.

    The wider the better for memory, but with few places beyond the edge of the matrix.
    """
    height = triton.next_power_of_2(rows)
    least, most = max(32, values // height), triton.next_power_of_2(width)
    widths = [1 << power for power in range(least.bit_length() - 1, values.bit_length())]
    columns = min(widths, key=lambda c: triton.cdiv(width, c) * (c + 64))
    columns = min(columns, most)
    return min(height, values // columns), columns


def _lines(rows: int, channels: int, values: int, dtype: torch.dtype) -> tuple[int, int]:
    """The same where the columns are channels, whose sums are to be spread over programs."""
    columns = min(triton.next_power_of_2(channels), _LINE // dtype.itemsize)
    return min(triton.next_power_of_2(rows), values // columns), columns


def _vector(values: Tensor | None) -> Any:
    """As the loops read it: without strides."""
    return values if values is None else values.resolve_neg().contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels, and how many values of a channel lie side by side: 1 where channels do."""
    samples, channels = x.shape[:2]
    if x.is_contiguous():
        return samples, channels, x.numel() // (samples * channels)
    return x.numel() // channels, channels, 1


def _multiprocessors(device: torch.device) -> int:
    return _count(device.index) if device.type == "cuda" else 4  # Triton's interpreter


@lru_cache(maxsize=64)
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _device_of(x: Tensor) -> Any:
    """Triton starts kernels on the current device and stream."""
    if x.is_cuda and torch.cuda.current_device() != x.device.index:
        return torch.cuda.device(x.device)
    return nullcontext()
