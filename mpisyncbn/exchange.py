"""The messages: pack, one collective, unpack, merge.

Every message of this table is a float64 buffer that begins with two words of fingerprint, ``h`` and
``h * h`` (fingerprint.py). The number of channels fixes its length. So a rank with an empty batch
sends zeros of the same size, and a forward that meets a backward is reported, not cut short.

=========  ==========  ===========================================  ===================
direction  collective  after the fingerprint                        float64 values sent
=========  ==========  ===========================================  ===================
forward    Allreduce   count, count * mean, M2 + count * mean**2    2C + 3
once more  Allreduce   the same, of distances from the group's mean 2C + 3
forward,   Allgather   count, mean, M2                              3C + 3
float64               (the mean in two rows: see kernels/)
backward   Allreduce   0, sum_dy, sum_dy_xmu                        2C + 3
=========  ==========  ===========================================  ===================

"Once more" follows a forward only if its sums show that they lost the digits of a variance. MPI
requires these sums to be identical on all ranks, so all ranks decide the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from . import enqueue, fingerprint, profiling
from .comm import transport
from .comm.communicator import Communicator
from .fingerprint import LayerCall
from .kernels import Array
from .merging import (
    Moments,
    cancelled_channels,
    is_absorbed,
    moments_of_rows,
    moments_of_sums,
    without_rounding,
)

__all__ = ["merge_moments", "reduce_sums", "serve_joined"]

Buffer: TypeAlias = Any  # as mpi4py takes it: an array, or a list that names memory on a device

_SUM, _GATHER = 1, 2  # kinds of messages, for ranks that have no more data
# A rank adds this to the first word if the sum of squares absorbs its M2. The sum over 131,072
# ranks is below 1.
_ABSORBED_FLAG = 2.0**-18
_NO_DATA = LayerCall("no layer, for want of data", "answer", 0, "any")


def merge_moments(group: Communicator, call: LayerCall, count: int, mean: Array, m2: Array) -> Moments:
    """Count, mean and biased variance of the whole group from the moments of its ranks.

    float32 layers send the sums ``count * mean`` and ``M2 + count * mean**2`` in float64. The size
    of that message does not grow with the number of ranks. The relative error of the variance is
    2e-16 * (mean / std)**2. If mean / std is beyond 1e4 in some channel that is not constant, a
    second message sums about the mean. float64 layers send all moments to all ranks, which merge
    them in rank order without cancellation (Chan, Golub and LeVeque 1979, eq. 2.1).

    Args:
        count: values per channel on this rank; 0 for an empty batch.
        mean, m2: of length C, any array; for float64 layers the mean is in two rows (kernels/).

    Returns:
        ``count, mean, var``, float64 NumPy vectors wherever the arguments live, with the same bits
        on every rank; arrays on the device under the stream transport. Without data, zeros.

    Raises:
        CollectiveMismatchError: on every rank, if the ranks were not all in the same call.
        MPISyncBNError: the group is the world, and torch.distributed or a launcher has more ranks.

    Collective: every rank of the group must call.
    """
    group.check_world()
    is_float64 = call.dtype == "float64"
    vectors: Sequence[Array] = (*mean, m2) if is_float64 else (mean, m2)
    if (worker := enqueue.worker_for(group, m2)) is not None:
        return enqueue.merge_moments(group, worker, call, count, vectors)
    vectors = _where_sent(group, *vectors)
    # The lock is held for both messages: nothing comes between them.
    with profiling.locked("mpisyncbn:merge_moments", group.lock):
        try:
            if is_float64:
                return moments_of_rows(_exchange_vectors(group, call, _GATHER, count, *vectors))
            return _sum_moments(group, call, count, *vectors)
        finally:
            group.rank_status.current_call = None


def reduce_sums(group: Communicator, call: LayerCall, *sums: Array) -> tuple[Array, ...]:
    """Sum vectors of one length, any arrays, over the group.

    Returns arrays of the kind that ``merge_moments`` returns.
    Collective: every rank of the group must call.
    """
    if (worker := enqueue.worker_for(group, sums[0])) is not None:
        return tuple(enqueue.reduce_sums(group, worker, call, sums))
    vectors: Sequence[Array] = _where_sent(group, *sums)
    with profiling.locked("mpisyncbn:reduce_sums", group.lock):
        try:
            if group.link is not None and len(sums) == 2 and type(vectors[0]) is np.ndarray:
                totals = np.empty((2, len(sums[0])))
                h = _begin_exchange(group, call, 3 + totals.size)
                problem = group.link.sum_vectors(h, vectors[0], vectors[1], totals)
                if problem:
                    fingerprint.raise_problem(group, call, problem)
                return totals[0], totals[1]
            return tuple(_exchange_vectors(group, call, _SUM, 0, *vectors)[3:].reshape(len(sums), -1))
        finally:
            group.rank_status.current_call = None


def _where_sent(group: Communicator, *vectors: Array) -> Sequence[Array]:
    """Return the vectors in the memory of this group's messages: the device's or the host's."""
    if type(vectors[0]) is np.ndarray:
        return vectors
    if isinstance(vectors[0], np.ndarray):  # a subclass may override operators
        return [np.asarray(vector) for vector in vectors]
    group.ready()  # the ranks agree on the transport there
    if group.transport == "device" and transport.has_device_pointer(vectors[0]):
        return vectors
    return transport.to_host(*vectors)


def _sum_moments(group: Communicator, call: LayerCall, count: int, mean: Array, m2: Array) -> Moments:
    """Merge the moments by sums. A second exchange recovers what they lose by cancellation."""
    if group.link is not None and type(mean) is np.ndarray:
        merged = np.empty((2, len(mean)))
        h = _begin_exchange(group, call, 3 + merged.size)
        problem, total, cancelled, absorbed = group.link.sum_moments(h, count, mean, m2, merged)
        if problem:
            fingerprint.raise_problem(group, call, problem)
        mean_of_all, var = merged[0], merged[1]
    else:
        sums = mean * count
        squares = mean * sums + m2
        flag = _ABSORBED_FLAG * is_absorbed(m2, squares)
        totals = _exchange_vectors(group, call, _SUM, count, sums, squares, flag=flag)
        total, mean_of_all, var, cancelled = moments_of_sums(totals)
        absorbed = totals[0] % 1 > 0
    if cancelled:
        mean_of_all, var = _merge_about_mean(group, call, (count, mean, m2), mean_of_all, var, absorbed)
    return total, mean_of_all, var


def _merge_about_mean(
    group: Communicator,
    call: LayerCall,
    moments: tuple[int, Array, Array],
    mean_of_all: np.ndarray,
    var: np.ndarray,
    absorbed: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of the group from sums about its mean, to recover cancelled digits.

    The exchange is skipped if all channels that lost digits may be constant, and no rank has said
    that an M2 of its own was ``absorbed``.
    """
    cancelled, origin, constant = cancelled_channels(mean_of_all, var)
    if constant and not absorbed:
        return mean_of_all, np.where(cancelled, 0.0, var)
    count, *vectors = moments
    mean, m2 = transport.to_host(*vectors)
    distance = mean - origin
    sums = distance * count
    again = call._replace(direction=f"{call.direction} once more")
    totals = _exchange_vectors(group, again, _SUM, count, sums, distance * sums + m2)
    _, distance, var, _ = moments_of_sums(totals)
    return origin + distance, without_rounding(var, distance)


def _exchange_vectors(
    group: Communicator, call: LayerCall, kind: int, count: int, *vectors: Array, flag: float = 0.0
) -> np.ndarray:
    """Send a message of ``count`` and vectors. Returns the sum of all messages, or a row for each.

    ``flag``, less than 1, is added to the first word. Readers of the fingerprint cut it off.
    """
    length = 3 + sum(len(vector) for vector in vectors)
    h = _begin_exchange(group, call, length, kind)
    header = np.array([h + flag, h * h, count], float)
    return _COLLECTIVES[kind](group, call, *_pack(group, header, vectors, length)).copy()


def _pack(group: Communicator, header: Array, vectors: Sequence[Array], length: int) -> tuple[Array, Buffer]:
    """Return a message of ``header`` and the vectors, as an array and as a buffer for MPI.

    It is in the memory of the vectors, host or device. The fingerprint stands first, so that it
    arrives even if another rank sent a shorter message.
    """
    if type(vectors[0]) is not np.ndarray:
        on_device = group.device_message(1, length, vectors[0])
        on_device.pack(header, vectors)
        return on_device.values, on_device.buffer
    message = group.message(length)
    np.concatenate((header, *vectors), out=message)
    return message, message


def _allreduce(group: Communicator, call: LayerCall, message: Array, buffer: Buffer) -> np.ndarray:
    """The sum of all ranks' messages, in host memory. MPI sums them in ``message`` itself."""
    _run_collective(group, call, message, group.comm.Allreduce, group.in_place, buffer)
    (total,) = transport.to_host(message)
    fingerprint.check(group, total[0], total[1], call)
    return total


def _allgather(group: Communicator, call: LayerCall, message: Array, buffer: Buffer) -> np.ndarray:
    """The messages of all ranks, one row each, in host memory."""
    if type(message) is np.ndarray:
        result: Array = np.empty(group.size * len(message))
        result_buffer: Buffer = result
    else:
        on_device = group.device_message(group.size, len(message), message)
        result, result_buffer = on_device.values, on_device.buffer
        if group.size == 1:  # message and result are one buffer
            buffer = group.in_place
    _run_collective(group, call, message, group.comm.Allgather, buffer, result_buffer)
    (gathered,) = transport.to_host(result)
    gathered = gathered.reshape(group.size, -1)
    fingerprint.check(group, gathered[:, 0].sum(), gathered[:, 1].sum(), call)
    return gathered


_COLLECTIVES = {_SUM: _allreduce, _GATHER: _allgather}


def _run_collective(
    group: Communicator, call: LayerCall, message: Array, collective: Callable[..., None], *buffers: Buffer
) -> None:
    """Call MPI, with the device of the message as the current one. Raises MPI's errors as ours."""
    try:
        if type(message) is np.ndarray:
            collective(*buffers)
        else:
            with transport.device_of(message):  # MPI may look at which one is current
                collective(*buffers)
    except group.mpi_error as error:
        fingerprint.raise_failed(group, call, error)


def _begin_exchange(group: Communicator, call: LayerCall, length: int, kind: int = _SUM) -> int:
    """Begin an exchange, which the watchdog watches from then on, and return its fingerprint."""
    rank_status = group.rank_status
    rank_status.current_call = call
    group.ready().synchronize()
    rank_status.exchanges += 1
    if group.debug and not group.in_join_context:
        fingerprint.compare_calls(group, call)
    h = fingerprint.fingerprint(call, rank_status.exchanges)
    if group.in_join_context:
        _share_header(group, kind, length, h)
    return h


def _share_header(group: Communicator, kind: int, length: int, h: int) -> np.ndarray:
    """Tell joined ranks of the next message: its kind, its length and its fingerprint.

    Returns these three. A joined rank passes zeros. The result is zeros once all ranks have joined.
    """
    header = np.array([kind, length, h], float)
    group.comm.Allreduce(group.in_place, header, op=group.max_op)
    return header


def serve_joined(group: Communicator) -> int:
    """Take part in the other ranks' exchanges, with a count of zero, until all ranks do so.

    Returns the number of these exchanges: 0 on the ranks that were the last to run out of data.
    Collective: every rank of the group must call, each when it has no more data (uneven.py).
    """
    answered = 0
    while True:
        with group.lock:
            group.synchronize()
            group.rank_status.exchanges += 1
            group.rank_status.current_call = _NO_DATA
            try:
                kind, length, h = (int(word) for word in _share_header(group, 0, 0, 0))
                if not kind:
                    return answered
                header = np.array([h, h * h, 0], float)
                message = _pack(group, header, [np.zeros(length - 3)], length)
                _COLLECTIVES[kind](group, _NO_DATA, *message)
                answered += 1
            finally:
                group.rank_status.current_call = None
