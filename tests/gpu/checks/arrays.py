"""Points 7 and 9 of scripts/gpu_check: CuPy arrays written late on a side stream."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from mpisyncbn import functional
from mpisyncbn.kernels import kernels_for

from .context import Context
from .records import summary

_SHAPE = (32, 12, 12)
_STEPS = 6


def with_torch(context: Context) -> None:
    """Check CuPy arrays in a process that can import torch. Collective."""
    import torch

    torch.cuda.set_device(context.device)
    _arrays(context, "dlpack")


def without_torch(context: Context) -> None:
    """Check CuPy arrays in a process that cannot import torch. Collective."""
    sys.modules["torch"] = None  # from here on, import torch fails
    _arrays(context, "generic")


def _arrays(context: Context, kernels: str) -> None:
    try:
        import cupy

        cupy.cuda.Device(context.rank % cupy.cuda.runtime.getDeviceCount()).use()
        cupy.zeros(4).sum().get()
    except Exception as error:  # CuPy, or a part of CUDA that it needs, is not installed
        context.records.skip("CuPy", summary(error))
        return
    stream = cupy.cuda.Stream(non_blocking=True)
    busy = cupy.zeros(1 << 26, "float32")  # 256 MB: one pass takes 0.1 ms on the fastest memory
    for dtype in ("float32", "float64", "float16"):
        for step in range(_STEPS):
            name = f"{dtype}, step {step}"
            with context.records.trying(name), stream:
                _step(context, cupy, busy, dtype, step, name, kernels)
    stream.synchronize()


def _step(context: Context, cupy: Any, busy: Any, dtype: str, step: int, name: str, kernels: str) -> None:
    records, channels = context.records, _SHAPE[0]
    random = np.random.default_rng([step, context.rank])
    shape = (4 + context.rank, *_SHAPE)
    x, dy = (random.normal(step, step + 1.0, shape).astype(dtype) for _ in range(2))
    vectors = "float64" if dtype == "float64" else "float32"
    weight = np.linspace(0.5, 1.5, channels).astype(vectors)
    bias = np.linspace(-1.0, 1.0, channels).astype(vectors)
    sources = [cupy.asarray(values) for values in (x, dy, weight, bias)]
    there = [cupy.zeros_like(source) for source in sources]
    running = [cupy.zeros(channels, vectors), cupy.ones(channels, vectors)]
    cupy.cuda.get_current_stream().synchronize()
    for _ in range(100):
        busy += 1.0
    for late, source in zip(there, sources, strict=True):
        cupy.copyto(late, source)
    used = kernels_for(there[0]).__name__.rpartition(".")[2]
    y, stats = functional.batch_norm_forward(there[0], *there[2:])
    updated = functional.update_running_stats(*running, stats, 0.5)
    for _ in range(100):
        busy += 1.0
    dx, dweight, dbias = functional.batch_norm_backward(there[1], there[0], stats, there[2])
    found = [array.get() for array in (y, dx, dweight, dbias, running[0])]
    updated = bool(updated)

    expected, scales = _expected(context.world, x, dy, weight, bias)
    bar = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3}[dtype]
    bars = (bar, bar, 1e-6, 1e-6, 1e-6)
    records.holds(f"{name}: served by {kernels}", used == kernels, used)
    records.holds(f"{name}: running statistics updated", updated)
    labels = ("y", "dx", "dweight", "dbias", "running_mean")
    for label, got, wanted, scale, most in zip(labels, found, expected, scales, bars, strict=True):
        error = np.abs(got.astype(float) - wanted).max() / scale
        records.at_most(f"{name}: {label}", float(error), most)


def _expected(world: Any, x: Any, dy: Any, weight: Any, bias: Any) -> tuple[list[Any], list[float]]:
    """Return this rank's y, dx, dweight and dbias, the running mean, and all scales. Collective."""
    axes, view = (0, 2, 3), (1, -1, 1, 1)
    shards = world.allgather((x.astype(float), dy.astype(float)))
    everything, gradient = (np.concatenate(parts) for parts in zip(*shards, strict=True))
    mean, var = everything.mean(axes), everything.var(axes)
    scale = (weight.astype(float) / np.sqrt(var + 1e-5)).reshape(view)
    xhat = (everything - mean.reshape(view)) / np.sqrt(var + 1e-5).reshape(view)
    dx = gradient - gradient.mean(axes).reshape(view) - xhat * (gradient * xhat).mean(axes).reshape(view)
    dx *= scale
    y = xhat * weight.astype(float).reshape(view) + bias.astype(float).reshape(view)
    begin = sum(len(shard) for shard, _ in shards[: world.rank])
    mine = slice(begin, begin + len(x))
    sums = (gradient * xhat)[mine].sum(axes), gradient[mine].sum(axes)
    sum_scale = np.abs(gradient * xhat).sum(axes).max()
    found = [y[mine], dx[mine], *sums, 0.5 * mean]
    scales = [np.abs(y).max(), np.abs(gradient * scale).max(), sum_scale, np.abs(gradient).sum(axes).max()]
    return found, [float(each) for each in (*scales, np.sqrt(var).max() + np.abs(mean).max())]
