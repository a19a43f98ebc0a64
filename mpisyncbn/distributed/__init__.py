"""torch.distributed over MPI: the backend ``mpi4py``, on which stock DistributedDataParallel runs.

    import mpisyncbn

    mpisyncbn.init_process_group()     # or: import mpisyncbn.distributed, and
                                       # torch.distributed.init_process_group("mpi4py")

There is no address to agree on and no variable to set. Every collective begins with a message of two numbers,
the fingerprint of what this rank is about to do: ranks that disagree get CollectiveMismatchError, with the
list of who did what, and ranks that wait too long CollectiveTimeoutError. Then come the values, in one call
of MPI. Collectives with ``async_op=True``, and those of DistributedDataParallel, run on a thread of their
process group, beside the backward pass; that takes MPI_THREAD_MULTIPLE, mpi4py's default.

A collective goes collectives.py -> checked.py -> mpi_collectives.py -> MPI, by way of work.py if in the
background.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .. import profiling
from ..comm import launcher
from ..comm.communicator import Communicator, mpi
from ..errors import on_rank
from . import rendezvous
from .joining import join
from .no_compile import no_compile
from .process_group import BACKEND, ProcessGroup, create_process_group
from .work import keep_works_of_reducers

__all__ = ["BACKEND", "ProcessGroup", "init_process_group", "join", "monitored_barrier"]


def init_process_group(comm: Any = None, timeout: timedelta | None = None) -> None:
    """Make ``mpi4py`` the backend of torch.distributed's default group.

    Args:
        comm: None or a communicator of all ranks of the world, whose order of ranks becomes torch's.
        timeout: how long a rank waits for the others in a collective; None: torch's 30 minutes.

    Raises:
        ValueError: it is initialized already, or ``comm`` does not contain all ranks:
            torch.distributed.new_group() makes groups of some.
        TypeError: ``comm`` is not an mpi4py communicator.
        MPISyncBNError: torch.distributed or a launcher knows of more ranks than MPI.

    Collective: every rank must call.
    """
    MPI = mpi()
    launcher.refuse_if_apart(MPI)
    source = Communicator(comm)._source
    if MPI.Comm.Compare(source, MPI.COMM_WORLD) == MPI.UNEQUAL:
        raise ValueError(
            f"expected a communicator of all {MPI.COMM_WORLD.size} ranks of the world, got one of "
            f"{source.size}{on_rank()}: initialize with all, then make groups with "
            "torch.distributed.new_group()"
        )
    if dist.is_initialized():
        raise ValueError(
            f"torch.distributed is initialized already, with backend {dist.get_backend()}{on_rank()}"
        )
    with rendezvous.use_comm(source):
        dist.init_process_group(BACKEND, init_method="mpi4py://", timeout=timeout)


@no_compile()
def monitored_barrier(
    group: Any = None, timeout: timedelta | None = None, wait_all_ranks: bool = False
) -> None:
    """torch.distributed.monitored_barrier, which takes only gloo, for groups of this backend.

    Raises CollectiveTimeoutError, on rank 0 with the ranks that did not come within ``timeout``.
    Collective: every rank of the group must call.
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"expected a group of backend {BACKEND}, got {group!r}{on_rank()}")
    with profiling.record("mpi4py:monitored_barrier"):
        group.monitored_barrier(timeout, wait_all_ranks)


if BACKEND not in dist.Backend.backend_list:
    dist.Backend.register_backend(BACKEND, create_process_group, extended_api=True, devices=["cpu", "cuda"])
    rendezvous.register(BACKEND)
    keep_works_of_reducers()
