"""Point 6 of scripts/gpu_check: times of the four kernels beside a copy and torch's kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpisyncbn.kernels import kernels_for

from .context import Context

_SHAPES = [
    (32, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (50, 2048, 7, 7),
    (8, 32, 64, 64, 64),
]
_LARGE = 32 * 256 * 56 * 56  # values
_TENSORS = {"moments": 1, "normalize": 2, "reduce": 2, "elementwise": 3}  # read or written by a kernel
_AHEAD = 600_000  # cycles, about 0.3 ms: the device waits while the host enqueues a timed call
_OF_COPY, _OF_TORCH, _OF_TORCH_FEW = 0.8, 1.05, 0.7

Peers = dict[str, Callable[[], Any]]


def kernels(context: Context) -> None:
    """Time the four kernels beside a copy and torch's SyncBatchNorm operations. It uses no MPI."""
    records = context.records
    shapes = _SHAPES[::2] if context.quick else _SHAPES
    rows = []
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                name = f"{shape} {str(dtype).rpartition('.')[2]} {layout}"
                with records.trying(name):
                    rows += _rows(context, name, shape, dtype, layout)
    with records.trying("torch's merge of ranks"):
        _merges(context)
    records.figure("kernels", kernels_for(torch.zeros(1, 1, device=context.device)).__name__)
    if not rows:
        return
    large = [row for row in rows if row["values"] >= _LARGE]
    few = [
        row
        for row in rows
        if row["channels"] <= 64 and row["layout"] == "contiguous" and row["kernel"] in ("moments", "reduce")
    ]
    _judge(records, "share of a copy's speed", large, "of copy", _OF_COPY, most=False)
    _judge(records, "time over torch's", rows, "of torch", _OF_TORCH)
    _judge(records, "time over torch's, few channels", few, "of torch", _OF_TORCH_FEW)


def _judge(
    records: Any, name: str, rows: list[dict[str, Any]], key: str, bar: float, most: bool = True
) -> None:
    """Record the worst row of each kernel as a bar, and in its name how many rows meet that bar."""
    for kernel in _TENSORS:
        of_kernel = [row for row in rows if row["kernel"] == kernel and key in row]
        if of_kernel:
            worst = (max if most else min)(of_kernel, key=lambda row: row[key])
            met = sum(row[key] <= bar if most else row[key] >= bar for row in of_kernel)
            title = f"{name}, {kernel}, {met} of {len(of_kernel)}, worst {worst['name']}"
            records.bar(title, worst[key], bar, most=most)


def _rows(
    context: Context, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> list[dict[str, Any]]:
    x, dy = _data(context, shape, dtype, layout), _data(context, shape, dtype, layout)
    ours, torchs = _ours(x, dy), _torchs(x, dy)
    target = torch.empty_like(x)
    # The sum over all values is only reported: a kernel of torch that reads, and hardly writes.
    peers = {"copy": lambda: target.copy_(x), "sum": lambda: x.sum()}
    peers |= {f"ours {kernel}": call for kernel, call in ours.items()}
    left_out = {}
    for kernel, call in torchs.items():
        try:
            call()
            peers[f"torch {kernel}"] = call
        except RuntimeError as error:  # torch's operation does not take this layout
            left_out[kernel] = str(error).splitlines()[0]
    times = timed(context, peers, 7 if context.quick else 21)
    rows: list[dict[str, Any]] = []
    speeds = {f"{name}, GB/s": n * x.nbytes / times[name] / 1e3 for name, n in (("copy", 2), ("sum", 1))}
    said: dict[str, Any] = {**speeds, "us": times}
    for kernel, tensors in _TENSORS.items():
        mine = times[f"ours {kernel}"]
        row = {
            "name": name,
            "kernel": kernel,
            "values": x.numel(),
            "channels": shape[1],
            "layout": layout,
            "of copy": tensors / 2 * times["copy"] / mine,
        }
        if f"torch {kernel}" in times:
            row["of torch"] = mine / times[f"torch {kernel}"]
        rows.append(row)
        said[kernel] = {key: row[key] for key in ("of copy", "of torch") if key in row}
    context.records.figure(name, said)
    for kernel, reason in left_out.items():
        context.records.skip(f"{name}, torch's {kernel}", reason)
    return rows


def _merges(context: Context) -> None:
    """Time torch's merge of the ranks' statistics. MPI and the host merge ours (latency.py)."""
    for channels in (64, 2048):
        peers: Peers = {}
        for ranks in (2, 4, 32):
            x = torch.zeros(1, channels, device=context.device)
            mean, invstd = torch.ones(2, ranks, channels, device=context.device)
            running, counts = torch.ones(2, channels, device=context.device), mean[:, 0].contiguous()
            peers[f"{ranks} ranks"] = partial(
                torch.batch_norm_gather_stats_with_counts, x, mean, invstd, *running, 0.1, 1e-5, counts
            )
        times = timed(context, peers, 7 if context.quick else 21)
        context.records.figure(f"batch_norm_gather_stats_with_counts, C = {channels}, us", times)


def timed(context: Context, peers: Peers, rounds: int) -> dict[str, float]:
    """Return the median time of each peer on the device, in microseconds.

    The peers take turns. No cache holds their data, because it is flushed before each call.
    """
    properties = torch.cuda.get_device_properties(context.device)
    cache = max(2 * getattr(properties, "L2_cache_size", 0), 128 << 20)  # bytes
    flush = torch.zeros(cache // 4, device=context.device)
    taken: dict[str, list[Any]] = {name: [] for name in peers}
    for number in range(rounds + 3):
        for name, call in peers.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()  # only reads, so that the cache has nothing to write back
            torch.cuda._sleep(_AHEAD)
            begin.record()
            call()
            end.record()
            if number >= 3:  # the first three rounds warm up
                taken[name].append((begin, end))
        context.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in pairs)
        for name, pairs in taken.items()
    }


def _data(context: Context, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "contiguous":
        return torch.randn(shape, dtype=dtype, device=context.device)
    last = torch.randn((shape[0], *shape[2:], shape[1]), dtype=dtype, device=context.device)
    return last.movedim(-1, 1)


def _ours(x: Tensor, dy: Tensor) -> Peers:
    kernels = kernels_for(x)
    mean, invstd, mean_dy, mean_dy_xmu = torch.ones(4, x.shape[1], dtype=torch.float64, device=x.device)
    weight, bias = torch.ones(2, x.shape[1], device=x.device)
    return {
        "moments": lambda: kernels.local_moments(x),
        "normalize": lambda: kernels.normalize(x, mean, invstd, weight, bias),
        "reduce": lambda: kernels.backward_reduce(dy, x, mean, invstd),
        "elementwise": lambda: kernels.backward_elementwise(
            dy, x, mean, invstd, weight, mean_dy, mean_dy_xmu
        ),
    }


def _torchs(x: Tensor, dy: Tensor) -> Peers:
    mean, invstd, sum_dy, sum_dy_xmu, weight, bias = torch.ones(6, x.shape[1], device=x.device)
    count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
    return {
        "moments": lambda: torch.batch_norm_stats(x, 1e-5),
        "normalize": lambda: torch.batch_norm_elemt(x, weight, bias, mean, invstd, 1e-5),
        "reduce": lambda: torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, True, True),
        "elementwise": lambda: torch.batch_norm_backward_elemt(
            dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count
        ),
    }
