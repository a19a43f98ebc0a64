"""Exchanges in the order of a device's streams (docs/explanation/transports.md).

The host enqueues an exchange and goes on. A thread of native code, the worker of the group
(kernels/cpu/worker.h), calls MPI when the device has computed the message. The stream waits for the
result, and copies it to the device. If the worker finds an error, the host has gone on already: the
results are NaN then, and the next exchange that the host enqueues raises the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

import numpy as np

from . import fingerprint, profiling
from .arguments import one_value_message
from .comm import transport
from .comm.communicator import Communicator
from .comm.staging import staging_for
from .comm.streams import Streams
from .errors import MPISyncBNError, on_rank
from .fingerprint import LayerCall
from .kernels import Array, native

if TYPE_CHECKING:
    from .kernels.cpu._cpu import Call, StreamWorker, Total
    from .kernels.protocol import NativeKernels

__all__ = [
    "device_streams",
    "locked",
    "merge_moments",
    "moments_call",
    "new_total",
    "reduce_sums",
    "sums_call",
    "worker_for",
]

_SUM_MOMENTS, _GATHER_MOMENTS, _SUM_VECTORS = 0, 1, 2  # as in worker.h
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_ONE_VALUE, _REPLAY_IN_JOIN = -2, -3  # as in collectives.h


def worker_for(group: Communicator, x: Array) -> StreamWorker | None:
    """The worker for exchanges of an array's device; None if the host takes part in them.

    The host takes part while ranks compare their calls (MPISYNCBN_DEBUG), and while some have no
    more data. Raises the error of an earlier exchange, on every rank. Collective at the first call.
    """
    if transport.on_host(x):
        return None
    group.ready()
    worker = group.stream
    if worker is None or group.debug or group.in_join_context:
        return None
    if worker.failed:
        raise_failure(group)
    return worker


def merge_moments(
    group: Communicator, worker: StreamWorker, call: LayerCall, count: int, vectors: Sequence[Array]
) -> tuple[Array, Array, Array]:
    """Enqueue the exchange of moments. Returns count, mean and variance on the device.

    ``vectors`` are mean and M2; for float64 layers the mean in two rows, and M2.
    """
    channels = len(vectors[-1])
    native_call, length = moments_call(group, call, channels), 3 * channels + 3
    out = _enqueue(group, worker, native_call, count, vectors, length, "mpisyncbn:merge_moments")
    mean, var, _ = out[: 3 * channels].reshape(3, channels)
    return out[3 * channels], mean, var


def reduce_sums(
    group: Communicator, worker: StreamWorker, call: LayerCall, vectors: Sequence[Array]
) -> Sequence[Array]:
    """Enqueue the sum of vectors of one length over the group. Returns the sums on the device."""
    values = len(vectors) * len(vectors[0])
    native_call = sums_call(group, call, values)
    sums = _enqueue(group, worker, native_call, 0, vectors, values, "mpisyncbn:reduce_sums")
    return list(sums.reshape(len(vectors), -1))


def locked(group: Communicator, name: str) -> AbstractContextManager[object]:
    """A context in which to enqueue an exchange. torch's profiler records it as ``name``."""
    group.on_failure = raise_failure
    return profiling.locked(name, group.lock)


def device_streams(x: Array) -> Streams:
    """The streams of an array's device."""
    staging = staging_for(x)
    if staging is None:
        raise MPISyncBNError(f"expected an array on a CUDA device, got one on {x.device}{on_rank()}")
    return staging.streams


def new_total() -> Total:
    """The count of a batch, which its forward exchange sets and its backward one divides by."""
    return _native_code().Total()


def moments_call(
    group: Communicator, call: LayerCall, channels: int, largest: float = _LARGEST_FLOAT32
) -> Call:
    """An exchange of moments, as the worker takes it.

    ``largest`` is the largest number of the running statistics' dtype.
    """
    kind = _GATHER_MOMENTS if call.dtype == "float64" else _SUM_MOMENTS
    return _native_call(group, call, kind, channels, largest)


def sums_call(group: Communicator, call: LayerCall, values: int) -> Call:
    """An exchange of ``values`` sums, of all vectors, as the worker takes it."""
    return _native_call(group, call, _SUM_VECTORS, values, 0.0)


def _native_code() -> NativeKernels:
    return cast("NativeKernels", native())  # the worker is native code too


def _native_call(group: Communicator, call: LayerCall, kind: int, values: int, largest: float) -> Call:
    key = call, kind, values, largest
    found = group.enqueued_calls.get(key)
    if found is None:
        again = call._replace(direction=f"{call.direction} once more")
        hashes = fingerprint.fingerprint(call, 0), fingerprint.fingerprint(again, 0)
        with group.lock:  # else another thread's call may get this number
            number = len(group.rank_status.calls)
            found = _native_code().Call(kind, number, values, *hashes, call.eps or 0.0, largest)
            group.enqueued_calls[key] = found
            group.rank_status.calls.append(call)
    return found


def _enqueue(
    group: Communicator,
    worker: StreamWorker,
    native_call: Call,
    count: int,
    vectors: Sequence[Array],
    length: int,
    name: str,
) -> Array:
    """Enqueue an exchange of vectors. Returns memory of its result on the device."""
    streams = device_streams(vectors[0])
    with locked(group, name):
        addresses, kept = streams.addresses(vectors)
        out, address = streams.empty(length)
        before, group.last_stream = group.last_stream, streams.current_stream()
        worker.enqueue(
            streams.device_and_stream(), native_call, count, None, None, addresses, address, None, ()
        )
        # Not before: memory is freed in the order of the stream, and CuPy destroys streams.
        del kept, before
    return out


def raise_failure(group: Communicator) -> None:
    """Raise the error that the worker has found, as an exchange by the host would raise it.

    Every rank of the group must call, because the workers of all have found it; but a replay inside
    join is found by this rank alone.
    """
    worker = group.stream
    if worker is None:
        return
    with group.lock:
        worker.wait()  # the exchanges enqueued since get NaN, and send nothing
        problem, number, _ = worker.failure()
        if not problem:
            return
        call = group.rank_status.calls[number]
        try:
            if problem == _REPLAY_IN_JOIN:
                raise MPISyncBNError(
                    "expected no replay of a captured graph inside join, where ranks without data serve only "
                    f"exchanges that the host begins; got one with the {call}{on_rank()}: run the model "
                    "without its graph there"
                )
            group.rank_status.align()
            if problem == _ONE_VALUE:
                raise ValueError(one_value_message(call.layer))
            fingerprint.raise_problem(group, call, problem)
        finally:
            worker.forget_failure()
