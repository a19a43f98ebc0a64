"""The process group of backend ``mpi4py``: an MPI communicator, as torch.distributed uses it."""

# mypy: disable-error-code="override, assignment"
# Torch overloads these methods, but calls them only in the forms that are defined here.

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from ..arguments import check_timeout
from ..comm import launcher
from ..comm.communicator import Communicator
from ..comm.groups import resolve
from ..comm.runtime import mpi
from ..errors import MPISyncBNError
from ..liveness.pending import keep_alive
from . import rendezvous
from .collectives import Collectives
from .no_compile import no_compile_methods
from .point_to_point import PointToPoint
from .rendezvous import BACKEND

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch._C._distributed_c10d import Store, _DistributedBackendOptions

__all__ = ["ProcessGroup", "create_process_group"]


@no_compile_methods
class ProcessGroup(Collectives, PointToPoint):
    """A process group of torch.distributed over an MPI communicator.

    torch.distributed makes it, in ``init_process_group`` and ``new_group``. The methods have
    torch's names and arguments. All but send and recv are collective.

    Raises:
        TypeError, ValueError: the arguments of all ranks cannot be used, for the same reason.
        CollectiveMismatchError: on every rank, if not all were about to make the same call, or if
            the arguments of some cannot be used. The message has the reasons.
        CollectiveTimeoutError: the other ranks did not come within the group's timeout.
    """

    def __init__(
        self, comm: MPI.Intracomm, timeout: timedelta, *, is_world: bool = False, store: Store | None = None
    ) -> None:
        check_timeout(timeout)
        super().__init__(comm, timeout)
        self._is_world = is_world
        self._store = rendezvous.lazy_store(store)  # kept here: torch keeps only its C++ half
        self._layer_group: Communicator | None = None
        self._name = self._description = ""

    @property
    def communicator(self) -> Communicator:
        """The Communicator of synchronized layers in this group.

        Their messages never meet those of the group itself.
        """
        if self._layer_group is None:
            self._layer_group = resolve(None) if self._is_world else _OwnBackendCommunicator(self)
        return self._layer_group

    def shutdown(self) -> None:
        """Wait for everything that was begun. The group cannot be used any more.

        Its communicators are freed when all ranks have, and make another group. Not collective.
        """
        if self._collective_group.comm is None:
            return
        if self._is_world and self._store is not None:
            self._store.close()
        self._collective_thread.close()
        still_in_flight = bool(self._unusable)
        self._keep_pending_alive()
        self._unusable = self._unusable or "this process group was destroyed"
        if still_in_flight:  # its communicators cannot be freed
            self._collective_group.rank_status.finalize_timeout = 0.0
            keep_alive(self._collective_group)
            return
        if self._layer_group is not None and not self._is_world:
            with suppress(MPISyncBNError):  # join has failed in it
                self._layer_group.drop()
        self._collective_group.drop()
        if self._is_world:
            rendezvous.forget()

    abort = shutdown

    def _keep_pending_alive(self) -> None:
        """Keep the memory of messages that are not done: MPI may still read and write it."""
        for work in list(self._pending):
            if self._collective_group._is_finalized() or not work.is_completed():
                keep_alive(work)

    def split_group(
        self, ranks: list[int], timeout: timedelta | None = None, *args: object, **kwargs: object
    ) -> ProcessGroup | None:
        """Return a group of some of the ranks, on these ranks; None on the others.

        Collective: every rank in ``ranks`` must call.
        """
        self._collective_thread.drain()
        if self.rank() not in ranks:
            return None
        timeout = timeout or self._timeout
        comm = rendezvous.create_comm(self._collective_group.ready().comm, sorted(ranks), timeout)
        return ProcessGroup(comm, timeout)

    # The attributes and methods that torch expects of a device's backend.

    supports_splitting = False

    def _get_backend(self, device: torch.device) -> ProcessGroup:
        return self

    def _set_default_timeout(self, timeout: timedelta) -> None:
        check_timeout(timeout)
        self._timeout = timeout

    set_timeout = _set_default_timeout

    def getBackendName(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    _set_group_name = setGroupName

    def _set_group_desc(self, text: str) -> None:
        self._description = text

    group_name = property(getGroupName, setGroupName)
    group_desc = property(lambda self: self._description, _set_group_desc)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]

    def __repr__(self) -> str:
        return f"ProcessGroup(rank={self.rank()}, size={self.size()}, backend={BACKEND})"


class _OwnBackendCommunicator(Communicator):
    """The communicator of a group's synchronized layers, made at their first exchange."""

    def __init__(self, process_group: ProcessGroup) -> None:
        super().__init__(process_group._collective_group.ready().comm)
        self._process_group = process_group

    def _create_comm(self) -> MPI.Intracomm:
        # one collective at a time, in the same order on every rank
        self._process_group._collective_thread.drain()
        with self._process_group._collective_group.lock:
            return super()._create_comm()


def create_process_group(options: _DistributedBackendOptions, _: object) -> ProcessGroup:
    """Return the process group that torch.distributed asks for, on each of its ranks.

    Raises ValueError if torch and MPI number the ranks differently.
    Collective: every rank of the group must call.
    """
    launcher.check_world_size(mpi())
    world, ranks = rendezvous.world_comm(), list(options.global_ranks_in_group)
    rank, size = (world.rank, world.size) if not ranks else (ranks.index(world.rank), len(ranks))
    if (options.group_rank, options.group_size) != (rank, size):
        raise ValueError(
            f"torch.distributed calls this rank {options.group_rank} of {options.group_size}, MPI {rank} of "
            f"{size}: unset RANK and WORLD_SIZE, or start the ranks with mpiexec or srun alone"
        )
    comm = rendezvous.create_comm(world, ranks, options.timeout)
    return ProcessGroup(comm, options.timeout, is_world=not ranks, store=options.store)
