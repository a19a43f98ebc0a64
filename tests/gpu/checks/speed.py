"""Point 6 of scripts/gpu_check: times of layers beside torch's, and of the host for a tiny one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import mpisyncbn
from benchmarks.peers import gloo
from benchmarks.timing import interleave

from .context import Context
from .records import summary

_SHAPE, _TINY = (50, 2048, 7, 7), (2, 64, 8, 8)
TIMES_FASTER = 3.0  # than torch over gloo


def layer(context: Context) -> None:
    """Time forward and backward of a layer, beside torch's layers. Collective."""
    records = context.records
    shape = _SHAPE if context.on_gpu else _TINY
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).rpartition(".")[2]
        ours = context.synced(_step(context, mpisyncbn.SyncBatchNorm, shape, dtype))
        local = context.synced(_step(context, torch.nn.BatchNorm2d, shape, dtype))
        calls = {"ours": ours, "torch.nn.BatchNorm2d": local}
        try:
            with gloo():
                theirs = context.synced(_step(context, torch.nn.SyncBatchNorm, shape, dtype))
                theirs()
                times = interleave({**calls, "torch over gloo": theirs}, 1.0, fewest=10)
        except Exception as error:  # any error: gloo, or torch over it, may not support this
            records.skip(f"{name}, torch over gloo", summary(error))
            times = interleave(calls, 1.0, fewest=10)
        said = {each: f"{found['median']:.0f} ({found['minimum']:.0f})" for each, found in times.items()}
        records.figure(f"{shape} {name}, us, median (minimum)", said)
        if "torch over gloo" in times and context.size > 1:  # with one rank, torch uses its local layer
            faster = times["torch over gloo"]["median"] / times["ours"]["median"]
            records.bar(f"{name}: times faster than torch over gloo", faster, TIMES_FASTER, most=False)


def tiny(context: Context) -> None:
    """Time a step of a layer so small that the host's calls take all the time. One rank."""
    steps = 50 if context.quick else 300
    for name, kind in (("ours", mpisyncbn.SyncBatchNorm), ("torch.nn.BatchNorm2d", torch.nn.BatchNorm2d)):
        step = _step(context, kind, _TINY, torch.float32)
        try:
            step()
        except RuntimeError as error:  # cuDNN fails under scripts/standin, which does not emulate it
            context.records.skip(f"{name}, by cuDNN", summary(error))
            torch.backends.cudnn.enabled = False
        for _ in range(20):
            step()
        context.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        context.synchronize()
        wall, cpu = (now - then for now, then in ((time.perf_counter(), wall), (time.process_time(), cpu)))
        micro = {"wall": wall / steps * 1e6, "CPU": cpu / steps * 1e6}
        context.records.figure(f"{_TINY} {name}, us of a step", micro)


def _step(context: Context, kind: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Any]:
    layer = kind(shape[1], device=context.device)
    x = torch.randn(shape, dtype=dtype, device=context.device, requires_grad=True)
    dy = torch.randn(shape, dtype=dtype, device=context.device)

    def step() -> None:
        x.grad = layer.weight.grad = layer.bias.grad = None
        layer(x).backward(dy)

    return step
