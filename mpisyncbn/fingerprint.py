"""The fingerprint in every message, and the errors if ranks are in different calls or MPI fails."""

from __future__ import annotations

import socket
import time
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from .errors import CollectiveMismatchError, MPISyncBNError
from .kernels import Array
from .liveness.pending import keep_alive

if TYPE_CHECKING:
    from mpi4py import MPI as mpi4py_MPI

    from .comm.communicator import Communicator

__all__ = [
    "LayerCall",
    "check",
    "compare_calls",
    "fingerprint",
    "layer_dtype",
    "mismatch",
    "raise_failed",
    "raise_problem",
]

# The sum of P squares is below P * 2**36. It is exact below 2**53, so for up to 131,072 ranks.
_BITS = 18
_MASK = (1 << _BITS) - 1

_PATIENCE = 10.0  # seconds that a rank waits for the others to say their calls, after a mismatch


class LayerCall(NamedTuple):
    """The exchange that a rank believes it is in. It must be equal on every rank of a group.

    The layer fixes every field, never this rank's input. So a rank with an empty batch, or with an
    input of another dtype by autocast, takes part like any other.
    """

    layer: str
    direction: str
    channels: int
    dtype: str  # of the layer, "float32" or "float64"
    eps: float | None = None  # None: the caller does not know it

    def __str__(self) -> str:
        eps = "" if self.eps in (None, 1e-5) else f", eps {self.eps}"
        return f"{self.direction} of {self.layer} ({self.channels} channels, {self.dtype}{eps})"


def layer_dtype(x: Array, *parameters: Array | None) -> str:
    """The dtype of a layer, "float64" or "float32": that of its parameters or else of ``x``."""
    decides = next((p for p in parameters if p is not None), x)
    return "float64" if decides.dtype.itemsize == 8 else "float32"


@lru_cache(maxsize=4096)
def _hash(call: tuple[object, ...]) -> int:
    return zlib.crc32(repr(tuple(call)).encode())


def fingerprint(call: tuple[object, ...], exchanges: int) -> int:
    """A hash of 18 bits, of ``call`` and the number of exchanges begun on this communicator."""
    return (_hash(call) + exchanges * 40503) & _MASK


def check(group: Communicator, sum_h: float, sum_hh: float, call: object) -> None:
    """Raise on every rank unless all ranks sent the same fingerprint.

    By Cauchy-Schwarz ``P * sum(h * h) >= sum(h)**2``, with equality only if all ``h`` are equal.
    All terms are whole numbers, so the comparison is exact, and the same on every rank.
    """
    try:
        same = group.size * int(sum_hh) == int(sum_h) ** 2
    except (OverflowError, ValueError):  # not finite: MPI mixed up messages of different lengths
        same = False
    if not same:
        mismatch(group, call)


def compare_calls(group: Communicator, call: LayerCall) -> None:
    """Raise CollectiveMismatchError on every rank if the ranks are about to make different calls.

    With MPISYNCBN_DEBUG=1 this comes before each collective. Its message has the same size for
    every call. Without it, ranks with different numbers of channels end in an error of MPI, or hang
    in it. Collective: every rank of the group must call.
    """
    try:
        calls = group.comm.allgather(_here(call))
    except group.mpi_error as error:
        raise MPISyncBNError(
            f"MPI failed before the {call} on rank {group.rank}: {error}{group.revoke_if_rank_lost(error)}"
        ) from error
    if len({what for _, what in calls}) > 1:
        _raise_mismatch(group, [f"on {host}: {what}" for host, what in calls])


def mismatch(group: Communicator, call: object) -> NoReturn:
    """Raise CollectiveMismatchError, which lists the call of each rank.

    Collective among the ranks that noticed. All ranks notice if all sent messages of one length.
    Otherwise some may wait in MPI for ever; after 10 seconds this rank raises without them.
    """
    record = np.array(["on {}: {}".format(*_here(call)).encode()], "S512")
    records = np.zeros(group.size, "S512")
    records[group.rank] = record[0]
    request = group.comm.Iallgather(record.view(np.uint8), records.view(np.uint8))
    deadline = time.monotonic() + _PATIENCE
    while not request.Test():
        if time.monotonic() > deadline:
            keep_alive(request, record, records)
            break
        time.sleep(0.001)
    silent = f"no answer in {_PATIENCE:.0f} s; it may wait in MPI for a message as long as its own"
    calls = [text.decode(errors="replace") or silent for text in records.tolist()]
    _raise_mismatch(group, calls)


def raise_problem(group: Communicator, call: LayerCall, problem: int) -> NoReturn:
    """Raise the error for the ``problem`` of a native exchange: see kernels/cpu/collectives.h."""
    if problem == -1:
        mismatch(group, call)
    raise_failed(group, call, group.mpi_error(problem))


def raise_failed(group: Communicator, call: LayerCall, error: mpi4py_MPI.Exception) -> NoReturn:
    """Raise MPISyncBNError for an error of MPI, or the mismatch that it comes from."""
    if error.Get_error_class() == group.truncated:
        try:
            mismatch(group, call)  # some rank sent a longer message
        except CollectiveMismatchError as raised:
            raise raised from error
    raise MPISyncBNError(
        f"MPI failed in rank {group.rank} of {group.size}, exchange number {group.exchanges} of this "
        f"communicator, {call}: {error}{group.revoke_if_rank_lost(error)}"
    ) from error


def _here(call: object) -> tuple[str, str]:
    return socket.gethostname(), str(call)


def _raise_mismatch(group: Communicator, calls: list[str]) -> NoReturn:
    group.forget_names()
    listing = "\n".join(f"  rank {rank} {what}" for rank, what in enumerate(calls))
    raise CollectiveMismatchError(
        f"expected all {group.size} ranks of the group to make the same call, but in exchange number "
        f"{group.exchanges} of this communicator they made different ones:\n{listing}\n"
        f"This is rank {group.rank}. Every rank must run the same layers and collectives in the same order; "
        "look for one that only some ranks run, or a branch that depends on the rank or its data."
    )
