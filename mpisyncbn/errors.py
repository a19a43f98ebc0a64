"""The exceptions this package raises beside ``ValueError`` and ``TypeError``."""

from __future__ import annotations

import sys

__all__ = ["CollectiveMismatchError", "CollectiveTimeoutError", "MPISyncBNError", "TransportError", "on_rank"]


class MPISyncBNError(RuntimeError):
    """Base of every error that is not about the value or type of an argument."""


class CollectiveMismatchError(MPISyncBNError):
    """The ranks of a group came to one collective with different layers or calls."""


class CollectiveTimeoutError(MPISyncBNError):
    """A rank waited longer for the others, in a collective of torch.distributed, than it may."""


class TransportError(MPISyncBNError):
    """The transport that ``MPISYNCBN_TRANSPORT`` asks for is not available."""


def on_rank() -> str:
    """The rank of an error, as text: `` (on rank 2 of 4)``; empty while MPI is not running.

    It never imports mpi4py: a wrong argument must not initialize MPI.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return ""  # torch cannot trace into MPI
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or not MPI.Is_initialized() or MPI.Is_finalized():
        return ""
    return f" (on rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size})"
