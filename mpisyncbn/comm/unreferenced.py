"""Free the communicators of groups that the program no longer refers to, or has destroyed.

MPI has room for some thousand communicators, and freeing one is collective, while each rank drops a
group at a time of its own. So when ranks make a new group they tell each other which groups they
have dropped, and free each one that all of its ranks have dropped.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from ..liveness import exits, reports
from ..liveness.rank_status import RankStatus

if TYPE_CHECKING:
    from ..kernels.cpu._cpu import StreamWorker
    from .communicator import Communicator

__all__ = ["GroupId", "cure_for_many", "finish_at_exit", "free_comm", "free_unreferenced", "ids", "track"]

GroupId: TypeAlias = tuple[str, str, int, int]  # the ProcessId of a group's first rank, and a number
_MANY = 500  # groups; every MPI has room for more
_tracked: dict[GroupId, tuple[weakref.ref[Communicator], RankStatus]] = {}


def track(group_id: GroupId, group: Communicator) -> None:
    """Remember the communicator of ``group``, to free it when the program has dropped ``group``."""
    _tracked[group_id] = weakref.ref(group), group.rank_status


def cure_for_many() -> str:
    """The cure that ends an error of MPI if it may have no room for more groups; else empty."""
    if len(_tracked) < _MANY:
        return ""
    return (
        f". This rank has {len(_tracked)} groups, and MPI has room for some thousand: drop groups that are "
        "not needed on all ranks, or free() them"
    )


def ids() -> list[GroupId]:
    """The tracked groups that this rank has dropped."""
    groups = [(group_id, group()) for group_id, (group, _) in list(_tracked.items())]
    return [group_id for group_id, group in groups if group is None or group.freed]


def free_unreferenced(ids_by_rank: Iterable[list[GroupId]]) -> None:
    """Free each group that all its ranks have dropped. ``ids_by_rank``: each rank's ``ids()``.

    Collective: every rank of the new group must call, with the same lists.
    """
    counts = Counter(group_id for group_ids in ids_by_rank for group_id in group_ids)
    for group_id, ranks in sorted(counts.items()):
        if group_id in _tracked and _tracked[group_id][1].size == ranks:
            free_comm(_tracked.pop(group_id)[1])


@cache
def finish_at_exit() -> None:
    """At exit, wait for all enqueued exchanges before MPI is finalized.

    A rank that fails does not wait, since its failure ends the job.
    """

    process = os.getpid()

    @atexit.register
    def finish() -> None:
        for _, rank_status in list(_tracked.values()):
            if rank_status.stream is not None and not exits.status() and os.getpid() == process:
                _wait_for(rank_status, rank_status.stream)
                rank_status.stream.stop()


def _wait_for(rank_status: RankStatus, worker: StreamWorker) -> None:
    """Wait for a group's enqueued exchanges. End the job if one failed: no later call can raise."""
    worker.wait()
    problem, call, exchange = worker.failure()
    if problem:
        reports.print_report(
            f"exchange number {exchange} of rank {rank_status.rank} of {rank_status.size}, "
            f"{rank_status.calls[call]}, has failed, and no exchange of the group comes after it"
        )
        reports.abort_job(1, "Communicator.synchronize() after the last exchange raises the error")


def free_comm(rank_status: RankStatus) -> None:
    """Free the communicator of a group, unless that is done. Collective among its ranks."""
    rank_status.unregister()
    worker = rank_status.stream
    if worker is not None:
        _wait_for(rank_status, worker)
        worker.close()  # a CUDA graph that is replayed after this gets NaN
        rank_status.stream = None
    comm, p2p_comm = rank_status.comm, rank_status.p2p_comm
    rank_status.comm = rank_status.p2p_comm = None
    if comm is not None:
        if p2p_comm is not None and p2p_comm is not comm:
            p2p_comm.Free()
        comm.Free()
