"""torch.distributed over MPI: the backend ``mpi4py``, on which stock DistributedDataParallel runs.

    import mpisyncbn

    mpisyncbn.init_process_group()     # or: import mpisyncbn.distributed, and
                                       # torch.distributed.init_process_group("mpi4py")

No address and no variable has to be set. Every collective begins with a message of two numbers,
the fingerprint of what this rank is about to do. Ranks that make different calls get
CollectiveMismatchError, which lists each rank's call; ranks that wait too long get
CollectiveTimeoutError. Then the values go in one call of MPI. Collectives with ``async_op=True``,
and those of DistributedDataParallel, run on a thread of their process group, which lets the
backward pass go on. That takes MPI_THREAD_MULTIPLE, mpi4py's default.

A collective goes through collectives.py, checked.py and mpi_collectives.py to MPI; asynchronous
ones go by way of the thread in work.py.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from .. import profiling
from ..arguments import check_timeout
from ..comm import launcher
from ..comm.communicator import Communicator
from ..comm.runtime import mpi
from ..errors import on_rank
from ..torch_versions import keep_flight_recorder_off, shut_down_groups_of
from . import rendezvous
from .joining import join
from .no_compile import no_compile
from .process_group import ProcessGroup, create_process_group
from .rendezvous import BACKEND
from .work import keep_works_of_reducers

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["BACKEND", "ProcessGroup", "init_process_group", "join", "monitored_barrier"]


def init_process_group(
    comm: MPI.Intracomm | Communicator | None = None, timeout: timedelta | None = None
) -> None:
    """Make ``mpi4py`` the backend of torch.distributed's default group.

    Args:
        comm: a communicator of all ranks of the world, whose order becomes the order of torch's
            ranks; None: MPI.COMM_WORLD.
        timeout: how long a rank waits for the others in a collective, and in this call; None:
            ``MPISYNCBN_TIMEOUT`` seconds if that is set (0: for ever), else 30 minutes. Groups of
            ``new_group`` have the same default. A rank that waits longer raises an error in a
            collective, and ends the job in this call or in ``new_group``.

    Raises:
        ValueError: torch.distributed is initialized already, or ``comm`` does not contain all
            ranks: torch.distributed.new_group() makes groups of some. Or ``timeout`` is not above
            0, or above 100 years.
        TypeError: ``comm`` is not a communicator, or ``timeout`` no timedelta.
        MPISyncBNError: torch.distributed or a launcher knows of more ranks than MPI.

    Collective: every rank must call.
    """
    MPI = mpi()
    launcher.check_world_size(MPI)
    if timeout is not None:
        check_timeout(timeout)
    given = Communicator(comm)._source
    if MPI.Comm.Compare(given, MPI.COMM_WORLD) == MPI.UNEQUAL:
        raise ValueError(
            f"expected a communicator of all {MPI.COMM_WORLD.size} ranks of the world, got one of "
            f"{given.size}{on_rank()}: initialize with all, then make groups with "
            "torch.distributed.new_group()"
        )
    if dist.is_initialized():
        raise ValueError(
            f"torch.distributed is initialized already, with backend {dist.get_backend()}{on_rank()}: "
            "leave this call out, or call torch.distributed.destroy_process_group() first"
        )
    with rendezvous.use_comm(given, timeout or default_pg_timeout):
        dist.init_process_group(BACKEND, init_method="mpi4py://", timeout=timeout)


@no_compile()
def monitored_barrier(
    group: dist.ProcessGroup | None = None, timeout: timedelta | None = None, wait_all_ranks: bool = False
) -> None:
    """Wait for all ranks of a group, as torch.distributed.monitored_barrier does for gloo alone.

    Args:
        group: a process group of backend mpi4py; None: torch's default group.
        timeout: how long to wait; None: the timeout of the group.
        wait_all_ranks: has no effect: rank 0 always waits for all ranks, and lists all that miss.

    Raises:
        TypeError: ``group`` is of another backend.
        CollectiveTimeoutError: a rank did not come in time; on rank 0 it says which ones.

    Collective: every rank of the group must call.
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"expected a group of backend {BACKEND}, got {group!r}{on_rank()}: call "
            "mpisyncbn.init_process_group() first, or pass a group that torch.distributed.new_group() made"
        )
    with profiling.record("mpi4py:monitored_barrier"):
        group.monitored_barrier(timeout, wait_all_ranks)


if BACKEND not in dist.Backend.backend_list:
    dist.Backend.register_backend(BACKEND, create_process_group, extended_api=True, devices=["cpu", "cuda"])
    rendezvous.register()
    keep_works_of_reducers()
    shut_down_groups_of(ProcessGroup)
    keep_flight_recorder_off(BACKEND)
