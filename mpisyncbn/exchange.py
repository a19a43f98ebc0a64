"""What goes on the wire: pack, one collective, unpack, merge.

Every message is a float64 buffer that begins with two words of fingerprint, ``h`` and ``h * h``
(diagnostics.py). Its length is fixed by the number of channels: a rank with an empty batch sends
zeros of the same size, and a forward that meets a backward is found out rather than truncated.

=========  ==========  ===========================================  ===================
direction  collective  after the fingerprint                        float64 values sent
=========  ==========  ===========================================  ===================
forward    Allreduce   count, count * mean, M2 + count * mean**2    2C + 3
forward,   Allgather   count, mean, M2                              3C + 3
float64               (the mean in two rows: see kernels/)
backward   Allreduce   0, sum_dy, sum_dy_xmu                        2C + 3
=========  ==========  ===========================================  ===================
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from . import diagnostics, transport
from .communicator import Communicator
from .diagnostics import Call
from .errors import CollectiveMismatchError, MPISyncBNError

__all__ = ["answer", "merge_moments", "reduce_sums"]

_SUM, _GATHER = 1, 2  # kinds of messages, as a joined rank is told of them
_NO_DATA = Call("no layer, for want of data", "answer", 0, "any")


def merge_moments(group: Communicator, call: Call, count: int, mean: Any, m2: Any) -> tuple[int, Any, Any]:
    """Count, mean and biased variance of the whole group from the moments of its ranks.

    float32 layers: sums of ``count * mean`` and ``M2 + count * mean**2`` in float64, whose error of
    2e-16 * (mean / std)**2 is no more than rounding the float32 input did already, in a message
    whose size does not grow with the number of ranks. float64 layers: all moments to all ranks,
    merged in rank order (Chan, Golub and LeVeque 1979, eq. 2.1), which does not cancel.

    Args:
        count: values per channel on this rank; 0 for an empty batch.
        mean, m2: of length C, any array; for float64 layers the mean is in two rows (kernels/).

    Returns:
        ``count, mean, var``, arrays of the same kind, the same bits on every rank. An empty group
        batch gives zeros.

    Raises:
        CollectiveMismatchError: on every rank, if the ranks were not all in the same call.

    Collective: every rank of the group must call.
    """
    merge = _gather_moments if call.dtype == "float64" else _sum_moments
    total, merged_mean, var = merge(group, call, count, transport.to_host(mean), transport.to_host(m2))
    return total, transport.from_host(merged_mean, mean), transport.from_host(var, m2)


def reduce_sums(group: Communicator, call: Call, *sums: Any) -> tuple[Any, ...]:
    """Vectors of one length summed over the group, as arrays of the same kind.

    Collective: every rank of the group must call.
    """
    if group.link is not None and len(sums) == 2 and type(sums[0]) is np.ndarray:
        totals = np.empty((2, len(sums[0])))
        with group.lock:
            problem = group.link.sum_vectors(_sign(group, call, 3 + totals.size), *sums, totals)
            if problem:
                _raise_problem(group, call, problem)
        return totals[0], totals[1]
    vectors = [transport.to_host(vector) for vector in sums]
    shape = len(vectors), len(vectors[0])
    with group.lock:
        message = group.message(3 + shape[0] * shape[1])
        message[2] = 0
        np.stack(vectors, out=message[3:].reshape(shape))
        _allreduce(group, call, message, _sign(group, call, len(message)))
        totals = message[3:].reshape(shape).copy()
    return tuple([transport.from_host(total, like) for total, like in zip(totals, sums, strict=True)])


def _sum_moments(
    group: Communicator, call: Call, count: int, mean: np.ndarray, m2: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray]:
    channels = len(mean)
    if group.link is not None:
        found = np.empty((2, channels))
        with group.lock:
            total = group.link.sum_moments(_sign(group, call, 3 + found.size), count, mean, m2, found)
            if total < 0:
                _raise_problem(group, call, total)
        return total, found[0], found[1]
    with group.lock:
        message = group.message(3 + 2 * channels)
        message[2] = count
        first, second = message[3 : 3 + channels], message[3 + channels :]
        np.multiply(mean, count, out=first)
        np.multiply(mean, first, out=second)
        second += m2
        _allreduce(group, call, message, _sign(group, call, len(message)))
        total = int(message[2])
        merged = first / max(total, 1)
        var = second / max(total, 1)
    square = merged * merged
    var -= square
    # What is left of a constant channel is rounding, of either sign; it has no variance. (NaN stays NaN.)
    var *= var > 1e-15 * square
    return total, merged, var


def _gather_moments(
    group: Communicator, call: Call, count: int, mean: np.ndarray, m2: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray]:
    channels = len(m2)
    with group.lock:
        message = group.message(3 + 3 * channels)
        message[2], message[3:] = count, np.concatenate((mean[0], mean[1], m2))
        gathered = _allgather(group, call, message, _sign(group, call, len(message), _GATHER))
    counts = gathered[:, 2:3]
    near, rest, m2s = np.split(gathered[:, 3:], 3, axis=1)
    total = int(counts.sum())
    # Means as distances from that of the first rank with data: small numbers, which keep their digits.
    # An empty rank's row is zeros, and its weight of 0 keeps it out of all sums.
    origin = near[np.argmax(counts > 0)]
    distances = (near - origin) + rest
    merged = (counts * distances).sum(axis=0) / max(total, 1)
    var = (m2s + counts * (distances - merged) ** 2).sum(axis=0) / max(total, 1)
    return total, origin + merged, var


def _allreduce(group: Communicator, call: Call, message: np.ndarray, h: int) -> None:
    _write_fingerprint(message, h)
    try:
        group.comm.Allreduce(group.in_place, message)
    except group.mpi_error as error:
        _raise_failed(group, call, error)
    diagnostics.check(group, message[0], message[1], call)


def _allgather(group: Communicator, call: Call, message: np.ndarray, h: int) -> np.ndarray:
    _write_fingerprint(message, h)
    gathered = np.empty((group.size, len(message)))
    try:
        group.comm.Allgather(message, gathered)
    except group.mpi_error as error:
        _raise_failed(group, call, error)
    diagnostics.check(group, gathered[:, 0].sum(), gathered[:, 1].sum(), call)
    return gathered


def _write_fingerprint(message: np.ndarray, h: int) -> None:
    # First in the message, so that they arrive even where another rank sent a shorter one.
    message[0], message[1] = h, h * h


def _sign(group: Communicator, call: Call, length: int, kind: int = _SUM) -> int:
    """The fingerprint of the exchange that is about to happen."""
    group.ready()
    if group.debug and not group.joining:
        diagnostics.agree(group, call)
    group.exchanges += 1
    h = diagnostics.fingerprint(call, group.exchanges)
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
            kind, length, h = (int(word) for word in _announce(group, 0, 0, 0))
            if not kind:
                return
            group.exchanges += 1
            (_allreduce if kind == _SUM else _allgather)(group, _NO_DATA, np.zeros(length), h)


def _raise_problem(group: Communicator, call: Call, problem: int) -> NoReturn:
    """Say what a Link returned: see cpu_link.h."""
    if problem == -1:
        diagnostics.mismatch(group, call)
    _raise_failed(group, call, group.mpi_error(-2 - problem))


def _raise_failed(group: Communicator, call: Call, error: Exception) -> NoReturn:
    if error.Get_error_class() == group.truncated:  # type: ignore[attr-defined]
        try:
            diagnostics.mismatch(group, call)  # some rank sent a longer message
        except CollectiveMismatchError as mismatch:
            raise mismatch from error
    raise MPISyncBNError(
        f"MPI failed in rank {group.rank} of {group.size}, exchange number {group.exchanges} of this "
        f"communicator, {call}: {error}"
    ) from error
