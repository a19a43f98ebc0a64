"""What goes on the wire: pack, one collective, unpack, merge.

Every message is a float64 buffer that begins with two words of fingerprint, ``h`` and ``h * h``
(diagnostics.py). Its length is fixed by the number of channels: a rank with an empty batch sends
zeros of the same size, and a forward that meets a backward is found out rather than truncated.

=========  ==========  ===========================================  ===================
direction  collective  after the fingerprint                        float64 values sent
=========  ==========  ===========================================  ===================
forward    Allreduce   count, count * mean, M2 + count * mean**2    2C + 3
once more  Allreduce   the same, of distances from the group's mean 2C + 3
forward,   Allgather   count, mean, M2                              3C + 3
float64               (the mean in two rows: see kernels/)
backward   Allreduce   0, sum_dy, sum_dy_xmu                        2C + 3
=========  ==========  ===========================================  ===================

"Once more" comes after a forward whose sums show that they lost the digits of a variance, and then only.
Sums decide that, which MPI requires to be identical on all ranks, so all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from . import fingerprint, profiling
from .comm import transport
from .comm.communicator import Communicator
from .errors import CollectiveMismatchError, MPISyncBNError
from .fingerprint import Call

__all__ = ["answer", "merge_moments", "reduce_sums"]

_SUM, _GATHER = 1, 2  # kinds of messages, as a joined rank is told of them
# A variance below _LOST * mean**2 has lost digits in the sums. If there is none, rounding leaves up to
# _ROUNDING * mean**2.
_LOST, _ROUNDING = 1e-8, 1e-15
# What a rank adds to the first word if its M2 will not show in the sums. 131,072 of them are less than 1.
_HIDDEN = 2.0**-18
_NO_DATA = Call("no layer, for want of data", "answer", 0, "any")


def merge_moments(
    group: Communicator, call: Call, count: int, mean: Any, m2: Any
) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean and biased variance of the whole group from the moments of its ranks.

    float32 layers: sums of ``count * mean`` and ``M2 + count * mean**2`` in float64, in a message whose
    size does not grow with the number of ranks. Their error is 2e-16 * (mean / std)**2 of the variance:
    where mean / std is beyond 1e4 in some channel that is not constant, they are summed once more, about
    the mean. float64 layers: all moments to all ranks, merged in rank order (Chan, Golub and LeVeque 1979,
    eq. 2.1), which does not cancel.

    Args:
        count: values per channel on this rank; 0 for an empty batch.
        mean, m2: of length C, any array; for float64 layers the mean is in two rows (kernels/).

    Returns:
        ``count, mean, var``, float64 NumPy vectors wherever the arguments live, the same bits on every
        rank. An empty group batch gives zeros.

    Raises:
        CollectiveMismatchError: on every rank, if the ranks were not all in the same call.
        MPISyncBNError: the group is the world, and torch.distributed or a launcher knows of more ranks.

    Collective: every rank of the group must call.
    """
    group.check_world()
    merge: Any
    if call.dtype == "float64":
        merge, vectors = _gather_moments, _where_sent(group, *mean, m2)
    else:
        merge, vectors = _sum_moments, _where_sent(group, mean, m2)
    if profiling.profiler._is_profiler_enabled:
        with profiling.record("mpisyncbn:merge_moments"):
            return merge(group, call, count, *vectors)
    return merge(group, call, count, *vectors)


def reduce_sums(group: Communicator, call: Call, *sums: Any) -> tuple[np.ndarray, ...]:
    """Vectors of one length, any arrays, summed over the group, as float64 NumPy vectors.

    Collective: every rank of the group must call.
    """
    vectors = _where_sent(group, *sums)
    lock: Any = group.lock
    if profiling.profiler._is_profiler_enabled:
        lock = profiling.recorded("mpisyncbn:reduce_sums", lock)
    if group.link is not None and len(sums) == 2 and type(vectors[0]) is np.ndarray:
        totals = np.empty((2, len(sums[0])))
        with lock:
            try:
                problem = group.link.sum_vectors(_sign(group, call, 3 + totals.size), *vectors, totals)
                if problem:
                    _raise_problem(group, call, problem)
            finally:
                group.presence.doing = None
        return totals[0], totals[1]
    with lock:
        return tuple(_exchanged(group, call, _SUM, 0, *vectors)[3:].reshape(len(sums), -1))


def _where_sent(group: Communicator, *vectors: Any) -> Sequence[Any]:
    """The vectors on the device, where messages are there; else in host memory."""
    if type(vectors[0]) is np.ndarray:
        return vectors
    if isinstance(vectors[0], np.ndarray):  # of a subclass, which may not do as arrays do
        return [np.asarray(vector) for vector in vectors]
    group.ready()  # which is when the ranks agree on the transport
    if group.transport == "device" and transport.on_device(vectors[0]):
        return vectors
    return transport.to_host(*vectors)


def _sum_moments(
    group: Communicator, call: Call, count: int, mean: Any, m2: Any
) -> tuple[int, np.ndarray, np.ndarray]:
    with group.lock:  # nothing comes between the two messages
        if group.link is not None and type(mean) is np.ndarray:
            found = np.empty((2, len(mean)))
            try:
                h = _sign(group, call, 3 + found.size)
                problem, total, lost, hidden = group.link.sum_moments(h, count, mean, m2, found)
                if problem:
                    _raise_problem(group, call, problem)
            finally:
                group.presence.doing = None
            merged, var = found[0], found[1]
        else:
            first = mean * count
            second = mean * first + m2
            mark = _HIDDEN * _hides(m2, second)
            totals = _exchanged(group, call, _SUM, count, first, second, mark=mark)
            total, merged, var, lost = _merged(totals)
            hidden = totals[0] % 1 > 0
        if lost:
            merged, var = _restored(group, call, (count, mean, m2), merged, var, hidden)
        return total, merged, var


def _hides(m2: Any, second: Any) -> bool:
    """Whether this rank has deviations in some channel that are lost when ``second`` is added up."""
    if type(m2) is not np.ndarray:
        return False  # on a device that would take more time than the rest of the message
    little = m2 < _LOST * second
    return bool(np.count_nonzero(little) and m2[little].any())


def _merged(totals: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, bool]:
    """Count, mean and variance of the group, and whether some variance has lost digits."""
    total, channels = int(totals[2]), len(totals) // 2 - 1
    means = totals[3:] / max(total, 1)
    merged, var = means[:channels], means[channels:]
    square = merged * merged
    var -= square
    return total, merged, var, bool(np.count_nonzero(var < _LOST * square))


def _restored(
    group: Communicator,
    call: Call,
    moments: tuple[Any, ...],
    merged: np.ndarray,
    var: np.ndarray,
    hidden: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the group where digits were lost: by sums about the mean, unless all is constant.

    ``hidden``: whether a rank said that it has deviations which do not show. Where none has, a channel is
    constant if its mean is a number of float32, which few others are, and only rounding is left of its
    variance. And about such a number the sums of a constant channel are exactly 0.
    """
    square = merged * merged
    lost = var < _LOST * square
    near = merged.astype(np.float32).astype(float)
    constant = (abs(var) <= _ROUNDING * square) & (abs(merged - near) <= _ROUNDING * abs(merged))
    if not hidden and constant[lost].all():
        return merged, np.where(lost, 0.0, var)
    origin = np.where(lost, near, 0.0)
    count, *vectors = moments
    mean, m2 = transport.to_host(*vectors)
    distance = mean - origin
    first = distance * count
    again = call._replace(direction=f"{call.direction} once more")
    _, distance, var, _ = _merged(_exchanged(group, again, _SUM, count, first, distance * first + m2))
    # What is left where all means are equal is rounding, of either sign. (NaN stays NaN.)
    var *= var > _ROUNDING * (distance * distance)
    return origin + distance, var


def _gather_moments(
    group: Communicator, call: Call, count: int, near: Any, rest: Any, m2: Any
) -> tuple[int, np.ndarray, np.ndarray]:
    gathered = _exchanged(group, call, _GATHER, count, near, rest, m2)[:, 2:]
    counts = gathered[:, :1]
    nears, rests, m2s = np.split(gathered[:, 1:], 3, axis=1)
    total = int(counts.sum())
    # Means as distances from that of the first rank with data: small numbers, which keep their digits.
    # An empty rank's row is zeros, and its weight of 0 keeps it out of all sums.
    origin = nears[np.argmax(counts > 0)]
    distances = (nears - origin) + rests
    merged = (counts * distances).sum(axis=0) / max(total, 1)
    var = (m2s + counts * (distances - merged) ** 2).sum(axis=0) / max(total, 1)
    return total, origin + merged, var


def _exchanged(
    group: Communicator, call: Call, kind: int, count: int, *vectors: Any, mark: float = 0.0
) -> np.ndarray:
    """What comes of messages with ``count`` and vectors: their sum, or a row of each rank. On the host.

    ``mark``, less than 1, is added to the first word. What reads the fingerprint cuts it off.
    """
    with group.lock:
        try:
            length = 3 + sum(len(vector) for vector in vectors)
            h = _sign(group, call, length, kind)
            header = np.array([h + mark, h * h, count], float)
            return _COLLECTIVES[kind](group, call, *_packed(group, header, vectors, length)).copy()
        finally:
            group.presence.doing = None


def _packed(group: Communicator, header: Any, vectors: Sequence[Any], length: int) -> tuple[Any, Any]:
    """A message, as array and as MPI wants it, where the vectors are.

    The fingerprint stands first, so that it arrives even where another rank sent a shorter message.
    """
    if type(vectors[0]) is not np.ndarray:
        on_device = group.device_message(1, length, vectors[0])
        on_device.pack(header, vectors)
        return on_device.values, on_device.buffer
    message = group.message(length)
    np.concatenate((header, *vectors), out=message)
    return message, message


def _allreduce(group: Communicator, call: Call, message: Any, buffer: Any) -> np.ndarray:
    """The sum of all ranks' messages, in host memory. In place."""
    _meet(group, call, message, group.comm.Allreduce, group.in_place, buffer)
    (total,) = transport.to_host(message)
    fingerprint.check(group, total[0], total[1], call)
    return total


def _allgather(group: Communicator, call: Call, message: Any, buffer: Any) -> np.ndarray:
    """The messages of all ranks, one row each, in host memory."""
    if type(message) is np.ndarray:
        everyone: Any = np.empty(group.size * len(message))
        into: Any = everyone
    else:
        on_device = group.device_message(group.size, len(message), message)
        everyone, into = on_device.values, on_device.buffer
        if group.size == 1:  # they are the same
            buffer = group.in_place
    _meet(group, call, message, group.comm.Allgather, buffer, into)
    (gathered,) = transport.to_host(everyone)
    gathered = gathered.reshape(group.size, -1)
    fingerprint.check(group, gathered[:, 0].sum(), gathered[:, 1].sum(), call)
    return gathered


_COLLECTIVES = {_SUM: _allreduce, _GATHER: _allgather}


def _meet(group: Communicator, call: Call, message: Any, collective: Any, *buffers: Any) -> None:
    try:
        if type(message) is np.ndarray:
            collective(*buffers)
        else:
            with transport.device_of(message):  # MPI may look at which one is current
                collective(*buffers)
    except group.mpi_error as error:
        _raise_failed(group, call, error)


def _sign(group: Communicator, call: Call, length: int, kind: int = _SUM) -> int:
    """The fingerprint of the exchange that is about to happen. From here on the watchdog looks at it."""
    presence = group.presence
    presence.doing = call
    group.ready()
    presence.exchanges += 1
    if group.debug and not group.joining:
        fingerprint.agree(group, call)
    h = fingerprint.fingerprint(call, presence.exchanges)
    if group.joining:
        _announce(group, kind, length, h)
    return h


def _announce(group: Communicator, kind: int, length: int, h: int) -> np.ndarray:
    """What the ranks with data are about to send; from a joined rank all zeros, and the same comes of it."""
    announced = np.array([kind, length, h], float)
    group.comm.Allreduce(group.in_place, announced, op=group.largest)
    return announced


def answer(group: Communicator) -> None:
    """Take part in the exchanges of others, with a count of zero, until every rank of the group is here.

    Collective: every rank of the group must call, each when it has no more data (joining.py).
    """
    while True:
        with group.lock:
            group.presence.exchanges += 1
            group.presence.doing = _NO_DATA
            try:
                kind, length, h = (int(word) for word in _announce(group, 0, 0, 0))
                if not kind:
                    return
                header = np.array([h, h * h, 0], float)
                message = _packed(group, header, [np.zeros(length - 3)], length)
                _COLLECTIVES[kind](group, _NO_DATA, *message)
            finally:
                group.presence.doing = None


def _raise_problem(group: Communicator, call: Call, problem: int) -> NoReturn:
    """Say what a Link returned: see kernels/cpu/link.h."""
    if problem == -1:
        fingerprint.mismatch(group, call)
    _raise_failed(group, call, group.mpi_error(problem))


def _raise_failed(group: Communicator, call: Call, error: Exception) -> NoReturn:
    if error.Get_error_class() == group.truncated:  # type: ignore[attr-defined]
        try:
            fingerprint.mismatch(group, call)  # some rank sent a longer message
        except CollectiveMismatchError as mismatch:
            raise mismatch from error
    raise MPISyncBNError(
        f"MPI failed in rank {group.rank} of {group.size}, exchange number {group.exchanges} of this "
        f"communicator, {call}: {error}{group.lost(error)}"
    ) from error
