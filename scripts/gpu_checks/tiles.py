"""Other tiles for the kernels, beside those in use: what cuda_plans.py has been told by a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from .bandwidth import _data, _ours, timed
from .context import Context

_SHAPES = [(32, 64, 112, 112), (32, 256, 56, 56), (32, 1024, 14, 14), (50, 2048, 7, 7)]
_THREADS = 32  # of a warp
# For sums: warps of a program, values of a tile for each of its threads, programs for each multiprocessor.
_SUMS = [(warps, values, 32 // warps) for warps in (4, 8, 16) for values in (8, 16)]
# For what goes element by element: warps, bytes for each thread, tiles for each program.
_ELEMENTS = [(warps, bytes, steps) for warps in (4, 8) for bytes in (32, 64) for steps in (1, 4)]


def tiles(context: Context) -> None:
    """This rank alone. For each tensor and verb, microseconds by tile: those in use first."""
    from mpisyncbn.kernels import cuda_plans

    for shape in _SHAPES[:2] if context.quick else _SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                name = f"{shape} {str(dtype).rpartition('.')[2]} {layout}"
                with context.records.trying(name):
                    _compare(context, cuda_plans, name, (shape, dtype, layout))


def _compare(context: Context, plans: Any, name: str, kind: tuple[Any, ...]) -> None:
    calls = _ours(_data(context, *kind), _data(context, *kind))
    for verbs, candidates, settings in (
        (("moments", "reduce"), _SUMS, _for_sums),
        (("normalize", "elementwise"), _ELEMENTS, _for_elements),
    ):
        for verb in verbs:
            peers = {"in use": calls[verb]}
            for candidate in candidates:
                peers[" ".join(map(str, candidate))] = _under(plans, settings(*candidate), calls[verb])
            times = timed(context, peers, 5 if context.quick else 9)
            best = min(times, key=times.__getitem__)
            found = {"in use": times["in use"], best: times[best], "all": times}
            context.records.figure(f"{name} {verb}", found)


def _for_sums(warps: int, values: int, programs: int) -> dict[str, int]:
    return {"_WARPS": warps, "_VALUES": _THREADS * warps * values, "_PROGRAMS": programs}


def _for_elements(warps: int, bytes: int, steps: int) -> dict[str, int]:
    return {"_SMALL_WARPS": warps, "_SMALL_BYTES": bytes, "_STEPS": steps}


def _under(plans: Any, settings: dict[str, int], call: Any) -> Any:
    """The call with plans made by other settings; made once, for they are what is timed after."""
    kept = {name: getattr(plans, name).__wrapped__ for name in ("sums", "elements")}
    made: dict[Any, Any] = {}

    @contextmanager
    def other() -> Iterator[None]:
        with ExitStack() as stack:
            for name, value in settings.items():
                stack.enter_context(mock.patch.object(plans, name, value))
            yield

    def remembered(name: str) -> Any:
        def plan(*arguments: Any) -> Any:
            key = name, *arguments
            if key not in made:
                with other():
                    made[key] = kept[name](*arguments)
            return made[key]

        return plan

    replaced = {name: remembered(name) for name in kept}

    def whole() -> None:
        before = {name: getattr(plans, name) for name in replaced}
        for name, plan in replaced.items():
            setattr(plans, name, plan)
        try:
            call()
        finally:
            for name, plan in before.items():
                setattr(plans, name, plan)

    return whole
