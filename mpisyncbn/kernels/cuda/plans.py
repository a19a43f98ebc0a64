"""Plans: how the work of a Triton kernel is shared out to programs, by the size of its input."""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["Plan", "plan_elementwise", "plan_merge", "plan_running_stats", "plan_sums", "plan_vector"]

# Sums: few large programs, because their results must be merged. Registers of a thread are limited
# so that all programs run at once. Measured on an H200, 2026-11-27.
_WARPS = 4
_VALUES = 32 * _WARPS * 8  # in a tile of a program; half as many of float64
_PROGRAMS, _REGISTERS = 8, 64  # programs for each multiprocessor; most registers of a thread
_SIDE_PROGRAMS, _SIDE_REGISTERS = 5, 96  # the same if channels lie side by side, where a thread holds vectors
_FEWER = 4  # programs for each multiprocessor, if their registers have no limit
_SIDE_CHANNELS = 32  # channels of a program: with 64 of bfloat16 there would be twice as much to merge
_LONGEST = 64  # tiles in a share: a float32 sum of this length keeps its digits
_SHORTEST = 8  # tiles in a share, except the last: fewer are not worth a second kernel
_MOST_SHARES = 65535  # CUDA's limit for a grid's second axis
_LINE = 128  # bytes side by side in a tile of channels, element by element: a cache line
_PARTS, _LEAST_PARTS = 1024, 128  # partial results that a program merges at once
# Element by element: many small programs.
_SMALL_WARPS = 4
_SMALL_BYTES, _SMALL_VALUES = 64, 16  # at most, for each thread: 4 loads of 16 bytes, or 16 of a value
_STEPS = 4  # tiles one below the other for each program, which loads the vectors once
_ENOUGH = 12  # programs for each multiprocessor, before a program gets several tiles
_VECTOR = 512  # channels of a program for vectors


class Plan:
    """The grid of a kernel, its sizes and options, and its ``launches`` so far (see __init__.py).

    Plans of sums also say in how many ``shares`` the tiles of a channel are divided, and whether
    there is only ``one`` tile.
    """

    __slots__ = ("grid", "launches", "one", "options", "shares", "sizes")

    def __init__(
        self,
        grid: tuple[int, ...],
        sizes: tuple[int, ...],
        options: dict[str, Any],
        shares: int = 1,
        one: bool = False,
    ) -> None:
        self.grid, self.sizes, self.options = (*grid, 1, 1)[:3], sizes, options
        self.shares, self.one = shares, one
        self.launches: dict[Any, Any] = {}


@lru_cache(maxsize=4096)
def plan_sums(samples: int, channels: int, length: int, dtype: torch.dtype, multiprocessors: int) -> Plan:
    planes = length > 1
    width = length if planes else channels
    values = min(_VALUES, _VALUES * 4 // dtype.itemsize)
    if planes and triton.next_power_of_2(samples) * triton.next_power_of_2(length) == 2 * values:
        values *= 2  # a single tile, which needs no loop
    if planes:
        rows, columns = _tile(samples, width, values)
    else:
        rows, columns = _lines(samples, width, values, _SIDE_CHANNELS)
    options = _options(planes, width, rows, columns, dtype, _WARPS)
    # Float64 values need two registers, and those not read 16 bytes at a time need addresses.
    limited = dtype != torch.float64 and options["ALIGN"] * dtype.itemsize >= 16
    programs = (_PROGRAMS if planes else _SIDE_PROGRAMS) if limited else _FEWER
    if limited and torch.version.hip is None:  # AMD's compiler refuses a limit
        options["maxnreg"] = _REGISTERS if planes else _SIDE_REGISTERS
    down, across = triton.cdiv(samples, rows), triton.cdiv(width, columns)
    tiles, blocks = (down * across, channels) if planes else (down, across)
    wanted = max(1, programs * multiprocessors // blocks)
    if wanted == 2 and tiles <= _LONGEST:
        wanted = 1  # a second kernel takes longer than half as many programs
    share = min(max(triton.cdiv(tiles, wanted), _SHORTEST), _LONGEST)
    share = max(share, triton.cdiv(tiles, _MOST_SHARES))
    shares = triton.cdiv(tiles, share)
    sizes = samples, width, channels * length, tiles, share, channels
    return Plan((blocks, shares), sizes, options, shares, tiles == 1)


@lru_cache(maxsize=4096)
def plan_merge(shares: int, length: int) -> Plan:
    rows = min(triton.next_power_of_2(shares), _PARTS)
    columns = max(1, _LEAST_PARTS // rows)
    options = {"ROWS": rows, "COLUMNS": columns, "num_warps": max(1, rows // 256), "enable_fp_fusion": True}
    return Plan((triton.cdiv(length, columns),), (shares, length), options)


@lru_cache(maxsize=4096)
def plan_elementwise(
    samples: int, channels: int, length: int, dtype: torch.dtype, multiprocessors: int
) -> Plan:
    planes = length > 1
    width = length if planes else channels
    values = _SMALL_BYTES // dtype.itemsize
    if math.gcd(width, 16) * dtype.itemsize < 16:
        values = min(values, _SMALL_VALUES)
    values *= 32 * _SMALL_WARPS
    if planes:
        columns = min(triton.next_power_of_2(width), values)
        rows = min(triton.next_power_of_2(samples), values // columns)
    else:
        rows, columns = _lines(samples, width, values, _LINE // dtype.itemsize)
    down, across = triton.cdiv(samples, rows), triton.cdiv(width, columns)
    steps = 1 if planes or down * across < _STEPS * _ENOUGH * multiprocessors else _STEPS
    grid = triton.cdiv(down, steps) * across * (channels if planes else 1)
    sizes = samples, width, channels * length, channels, across
    options = _options(planes, width, rows, columns, dtype, _SMALL_WARPS) | {"STEPS": steps}
    return Plan((grid,), sizes, options)


@lru_cache(maxsize=4096)
def plan_running_stats(channels: int, *numbers: float) -> Plan:
    """A plan that holds the bits of the numbers, because Triton would round them to float32."""
    bits = struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))
    vector = plan_vector(channels)
    return Plan(vector.grid, (channels, *bits), vector.options)


@lru_cache(maxsize=4096)
def plan_vector(channels: int) -> Plan:
    """A plan for vectors that have a value for each channel."""
    columns = min(_VECTOR, triton.next_power_of_2(channels))
    options = {"COLUMNS": columns, "num_warps": _SMALL_WARPS, "enable_fp_fusion": True}
    return Plan((triton.cdiv(channels, columns),), (channels,), options)


def _options(
    planes: bool, width: int, rows: int, columns: int, dtype: torch.dtype, warps: int
) -> dict[str, Any]:
    return {
        "ALIGN": math.gcd(width, 16),
        "INDEX": tl.int64 if width > 1 << 30 else tl.int32,  # the type of a column's index
        "PLANES": planes,
        "ROWS": rows,
        "COLUMNS": columns,
        "COMPUTE_DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": min(warps, max(1, rows * columns // 256)),  # a warp is 32 threads of eight values
        "enable_fp_fusion": True,
    }


def _tile(rows: int, width: int, values: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of tiles of about ``values`` values of a matrix.

    Wide tiles suit memory, but few places should be beyond the edge of the matrix.
    """
    height = triton.next_power_of_2(rows)
    least, most = max(32, values // height), triton.next_power_of_2(width)
    widths = [1 << power for power in range(least.bit_length() - 1, values.bit_length())]
    columns = min(widths, key=lambda c: triton.cdiv(width, c) * (c + 64))
    columns = min(columns, most)
    return min(height, values // columns), columns


def _lines(rows: int, channels: int, values: int, most: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of tiles of at most ``most`` channels, one a column.

    They are narrow, so that the sums of many rows are spread over programs.
    """
    columns = min(triton.next_power_of_2(channels), most)
    return min(triton.next_power_of_2(rows), values // columns), columns
