"""Time other tiles beside those in use, to choose those of mpisyncbn/kernels/cuda/plans.py."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import torch

from .bandwidth import _data, _ours, timed
from .context import Context

_THREADS = 32  # in a warp
# Sums: warps of a program, values of a tile for each thread, and the most registers of a thread.
_SUMS = [(warps, values, most) for warps in (2, 4, 8) for values in (8, 16) for most in (64, 80, 128)]
_ALL_REGISTERS = 1 << 16  # of a multiprocessor
# Elementwise kernels: warps of a program, bytes for each thread, tiles for each program.
_ELEMENTS = [(warps, bytes, steps) for warps in (4, 8) for bytes in (32, 64) for steps in (1, 4)]


def tiles(context: Context, shape: list[int]) -> None:
    """Record the microseconds of each kernel by tile, the tile in use first. Without MPI."""
    from mpisyncbn.kernels.cuda import plans

    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            name = f"{tuple(shape)} {str(dtype).rpartition('.')[2]} {layout}"
            with context.records.trying(name):
                _compare(context, plans, name, (tuple(shape), dtype, layout))


def _compare(context: Context, plans: Any, name: str, kind: tuple[Any, ...]) -> None:
    calls = _ours(_data(context, *kind), _data(context, *kind))
    for kernels, candidates, settings in (
        (("moments", "reduce"), _SUMS, _for_sums),
        (("normalize", "elementwise"), _ELEMENTS, _for_elements),
    ):
        for kernel in kernels:
            peers = {"in use": calls[kernel]}
            for candidate in candidates:
                peers[" ".join(map(str, candidate))] = _under(plans, settings(*candidate), calls[kernel])
            times = timed(context, peers, 5 if context.quick else 9)
            best = min(times, key=times.__getitem__)
            found = {"in use": times["in use"], best: times[best], "all": times}
            context.records.figure(f"{name} {kernel}", found)


def _for_sums(warps: int, values: int, registers: int) -> dict[str, int]:
    """Return settings of plans.py with as many programs as the registers allow."""
    programs = _ALL_REGISTERS // (registers * warps * _THREADS)
    return {
        "_WARPS": warps,
        "_VALUES": _THREADS * warps * values,
        **dict.fromkeys(("_REGISTERS", "_SIDE_REGISTERS"), registers),
        **dict.fromkeys(("_PROGRAMS", "_SIDE_PROGRAMS"), programs),
    }


def _for_elements(warps: int, bytes: int, steps: int) -> dict[str, int]:
    return {"_SMALL_WARPS": warps, "_SMALL_BYTES": bytes, "_STEPS": steps}


def _under(plans: Any, settings: dict[str, int], call: Any) -> Any:
    """Return ``call`` with plans by other settings, which the first call makes."""

    def made(name: str) -> Any:
        make = getattr(plans, name).__wrapped__

        @cache
        def plan(*arguments: Any) -> Any:
            with mock.patch.multiple(plans, **settings):
                return make(*arguments)

        return plan

    replaced = {name: made(name) for name in ("plan_sums", "plan_elementwise")}

    def whole() -> None:
        with mock.patch.multiple(plans, **replaced):
            call()

    return whole
