"""The module mpi4py.MPI, for a process that may use it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from .. import config
from ..errors import MPISyncBNError, on_rank
from . import ancestors

if TYPE_CHECKING:
    from mpi4py import MPI as mpi4py_MPI

__all__ = ["check_comm", "forked", "lock", "mpi", "type_name", "world_ranks"]

_forked = False  # whether this process was forked from one that runs MPI
_one_at_a_time = threading.RLock()


def mpi() -> ModuleType:
    """Return the module ``mpi4py.MPI``, ready for use.

    Importing it initializes MPI, so it is imported at its first use: a worker process that only
    imports the program again must not initialize MPI. Raises MPISyncBNError if this process cannot
    use MPI, or MPI is not initialized, finalized, or without support for threads.
    """
    if _forked:
        raise MPISyncBNError(
            "this process was forked from one that runs MPI, which it cannot use itself: train in the "
            "parent, and use the model here in eval mode only"
        )
    if "mpi4py.MPI" not in sys.modules and _is_worker() and config.launched():
        raise MPISyncBNError(
            "this is a worker process of a rank of MPI, and no rank itself: synchronized batch norm works in "
            "training mode on the ranks that the launcher started"
        )
    if "mpi4py.MPI" not in sys.modules and (rank_pid := ancestors.ancestor_rank_pid()) is not None:
        raise MPISyncBNError(ancestors.child_message(rank_pid))
    from mpi4py import MPI

    if MPI.Is_finalized():
        raise MPISyncBNError(
            "MPI is already finalized: synchronized batch norm needs it running; call MPI.Finalize() later, "
            "or leave it to mpi4py at exit"
        )
    if not MPI.Is_initialized():
        raise MPISyncBNError(
            "MPI is not initialized (mpi4py.rc.initialize is off): call MPI.Init_thread(MPI.THREAD_MULTIPLE) "
            "before the first training step"
        )
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise MPISyncBNError(
            f"MPI provides thread level {MPI.Query_thread()}, expected at least MPI.THREAD_SERIALIZED "
            f"({MPI.THREAD_SERIALIZED}), because autograd may run backward on another thread{on_rank()}: "
            "ask for it with mpi4py.rc.thread_level or MPI.Init_thread"
        )
    return MPI


def _is_worker() -> bool:
    """Whether multiprocessing started this process."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    return multiprocessing is not None and multiprocessing.parent_process() is not None


def check_comm(comm: object) -> None:
    """Raise TypeError or ValueError unless ``comm`` is an intra-communicator with this rank."""
    MPI = mpi()
    if not isinstance(comm, MPI.Comm):
        raise TypeError(f"expected an mpi4py communicator, got {type_name(comm)}{on_rank()}")
    if comm == MPI.COMM_NULL:
        raise ValueError(
            f"expected a communicator that contains this rank, got MPI.COMM_NULL{on_rank()}: it was freed, "
            "or this rank is not in the group; build the layer only on the group's own ranks"
        )
    if comm.Is_inter():
        raise ValueError(
            f"expected an intra-communicator, got an inter-communicator{on_rank()}: "
            "merge it first, comm.Merge()"
        )


def world_ranks(comm: mpi4py_MPI.Comm | None, ranks: Sequence[int] | None = None) -> list[int]:
    """The rank in the world of each rank of ``comm``, or of ``ranks`` alone; empty if not known."""
    MPI = mpi()
    if comm is None or comm == MPI.COMM_NULL:  # freed
        return []
    ours, everybody = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    try:
        found = list(ours.Translate_ranks(ranks, everybody))
    finally:
        ours.Free()
        everybody.Free()
    return [] if MPI.UNDEFINED in found else found  # a merged group has ranks of another world


def type_name(value: object) -> str:
    """The full name of the type of a value, for messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def lock() -> threading.RLock:
    """Return a lock to hold in the collectives of one communicator."""
    MPI = mpi()
    # Below THREAD_MULTIPLE, MPI takes one call at a time, even for two communicators.
    return threading.RLock() if MPI.Query_thread() == MPI.THREAD_MULTIPLE else _one_at_a_time


def forked() -> None:
    """Note that this process was forked: MPI belongs to its parent."""
    global _forked, _one_at_a_time
    _forked = "mpi4py.MPI" in sys.modules
    _one_at_a_time = threading.RLock()  # a thread of the parent may hold the old one
