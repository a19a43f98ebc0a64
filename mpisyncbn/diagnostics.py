"""Who is in which collective: the fingerprint in every message, and the errors that come of it."""

from __future__ import annotations

import socket
import zlib
from functools import lru_cache
from typing import Any, NamedTuple

from .errors import CollectiveMismatchError

__all__ = ["Call", "agree", "check", "fingerprint"]

# P ranks stay exact while P * 2**36, the sum of the squares, is below 2**53: up to 131,072 ranks.
_BITS = 18
_MASK = (1 << _BITS) - 1


class Call(NamedTuple):
    """What one rank believes it is doing. Equal on every rank of a group, or the exchange is refused.

    Every field is fixed by the layer, never by this rank's input: a rank with an empty batch, or
    one that autocast gave another dtype, takes part like any other.
    """

    layer: str
    direction: str
    channels: int
    dtype: str  # of the layer, "float32" or "float64"

    def __str__(self) -> str:
        return f"{self.direction} of {self.layer} ({self.channels} channels, {self.dtype})"


@lru_cache(maxsize=4096)
def _hash(call: Call) -> int:
    return zlib.crc32(repr(tuple(call)).encode())


def fingerprint(call: Call, exchanges: int) -> int:
    """18 bits of ``call`` and of how many exchanges this communicator has done."""
    return (_hash(call) + exchanges * 40503) & _MASK


def check(group: Any, sum_h: float, sum_hh: float, call: Call) -> None:
    """Raise on every rank unless all ranks sent the same fingerprint.

    By Cauchy-Schwarz ``P * sum(h * h) >= sum(h)**2``, with equality only if all ``h`` are equal.
    All terms are whole numbers, so the comparison is exact, and the same on every rank.
    """
    if group.size * int(sum_hh) != int(sum_h) ** 2:
        # All ranks see these same two sums, so all of them are here and can tell each other why.
        _raise_mismatch(group, group.comm.allgather((socket.gethostname(), str(call))), group.exchanges)


def agree(group: Any, call: Call) -> None:
    """With MPISYNCBN_DEBUG=1, before each collective: a message of fixed size, whatever the ranks do.

    Without it, ranks with different numbers of channels end in an error of MPI itself, or hang in it.
    Collective: every rank of the group must call.
    """
    calls = group.comm.allgather((socket.gethostname(), str(call)))
    if len({what for _, what in calls}) > 1:
        _raise_mismatch(group, calls, group.exchanges + 1)


def _raise_mismatch(group: Any, calls: list[tuple[str, str]], number: int) -> None:
    listing = "\n".join(f"  rank {rank} on {host}: {what}" for rank, (host, what) in enumerate(calls))
    raise CollectiveMismatchError(
        f"expected all {group.size} ranks of the group to make the same call, but in exchange number {number} "
        f"of this communicator they made different ones:\n{listing}\n"
        f"This is rank {group.rank}. Every rank must run the same layers in the same order; "
        "look for a layer that only some ranks run, or a branch that depends on the rank or its data."
    )
