"""Point 5 of scripts/gpu_check: times of an exchange by each transport, and of MPI."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.peers import gloo
from benchmarks.timing import interleave
from mpisyncbn import exchange
from mpisyncbn.batch_stats import invstd_of
from mpisyncbn.comm import transport
from mpisyncbn.errors import TransportError
from mpisyncbn.fingerprint import LayerCall

from .context import Context
from .records import summary

_CHANNELS = (64, 256, 1024, 2048)
_OURS, _STREAM, _MPI = "ours, pinned", "ours, stream", "MPI alone, host memory"
_IN_GRAPH = 20  # exchanges in a CUDA graph, which the host launches with one call
_BAR = 25.0  # microseconds that an exchange may take beyond MPI's own time


def _ours(group: Any, channels: int, context: Context) -> Callable[[], Any]:
    """Return a function that merges moments on the device into statistics on the device."""
    mean, m2 = torch.ones(2, channels, dtype=torch.float64, device=context.device).unbind()
    call = LayerCall("the latency check", "forward", channels, "float32")

    def whole() -> Any:
        _, merged, var = exchange.merge_moments(group, call, 100, mean, m2)
        return transport.to_device_of(mean, merged, var, invstd_of(var, 1e-5))

    return whole


def _enqueued(group: Any, channels: int, context: Context) -> Callable[[], Any]:
    """Return a function that launches a CUDA graph of exchanges of the stream transport."""
    mean, m2 = torch.ones(2, channels, dtype=torch.float64, device=context.device).unbind()
    call = LayerCall("the latency check", "forward", channels, "float32")

    def exchanges() -> None:
        for _ in range(_IN_GRAPH):
            exchange.merge_moments(group, call, 100, mean, m2)

    exchanges()
    context.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchanges()

    def replay(_: object = (mean, m2)) -> None:  # the default keeps alive what the graph reads
        graph.replay()

    return replay


def _pageable(channels: int, context: Context) -> Callable[[], Any]:
    from mpi4py import MPI

    mean, m2 = torch.ones(2, channels, dtype=torch.float64, device=context.device).unbind()

    def whole() -> Any:
        vectors = [vector.cpu().numpy() for vector in (mean, m2)]
        message = np.concatenate((np.zeros(3), *vectors))
        context.world.Allreduce(MPI.IN_PLACE, message)
        merged, var = message[3:].reshape(2, -1)
        return torch.from_numpy(np.stack((merged, var, var))).to(context.device)

    return whole


def _peers(context: Context) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the peers, and the names of those left out, each with a reason. Collective.

    A peer is a function of the number of channels, which returns the call to time.
    """
    from mpi4py import MPI

    host = context.group("host")
    peers: dict[str, Any] = {
        _OURS: lambda channels: _ours(host, channels, context),
        "pageable": lambda channels: _pageable(channels, context),
        _MPI: lambda channels: partial(context.world.Allreduce, MPI.IN_PLACE, np.zeros(2 * channels + 3)),
    }
    left_out = []
    others = {"ours, device pointer": ("device", _ours)}
    if context.on_gpu:
        others[_STREAM] = "stream", _enqueued
    for name, (where, make) in others.items():
        try:
            peers[name] = partial(make, context.group(where), context=context)
        except TransportError as error:
            left_out.append((name, summary(error)))
    return peers, left_out


def latencies(context: Context) -> None:
    """Time the exchange of each peer. Collective."""
    records = context.records
    peers, left_out = _peers(context)
    with ExitStack() as stack:
        try:
            stack.enter_context(gloo())
            dist.all_reduce(torch.zeros(8, device=context.device))

            def reduced(channels: int) -> Callable[[], Any]:
                message = torch.zeros(2 * channels + 3, dtype=torch.float64, device=context.device)
                return lambda: dist.all_reduce(message)

            peers["gloo"] = reduced
        except Exception as error:  # any error: gloo may not support this
            left_out.append(("gloo", summary(error)))
        for name, reason in left_out:
            records.skip(name, reason)
        for channels in _CHANNELS[::3] if context.quick else _CHANNELS:
            calls = {name: context.synced(make(channels)) for name, make in peers.items()}
            times = interleave(calls, 0.3 if context.quick else 1.5, warm=10, fewest=20, most=2000)
            if _STREAM in times:
                times[_STREAM] = {label: value / _IN_GRAPH for label, value in times[_STREAM].items()}
            records.figure(
                f"C = {channels}, us, median (minimum)",
                {name: f"{each['median']:.1f} ({each['minimum']:.1f})" for name, each in times.items()},
            )
            for name in filter(times.__contains__, (_OURS, _STREAM)):
                for label in ("median", "minimum"):
                    beyond = times[name][label] - times[_MPI][label]
                    records.bar(f"C = {channels}, {name}, us beyond MPI's own, {label}", beyond, _BAR)
