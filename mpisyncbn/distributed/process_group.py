"""The process group of backend ``mpi4py``: an MPI communicator as torch.distributed takes it."""

# mypy: disable-error-code="override, assignment"
# Torch calls these with lists and options alone, and has names for the other ways to call it.

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from .. import fingerprint
from ..arguments import check_timeout
from ..comm import launcher
from ..comm.communicator import Communicator, mpi, resolve, subset
from . import rendezvous
from .collectives import Collectives
from .no_compile import no_compile_methods
from .point_to_point import PointToPoint

__all__ = ["BACKEND", "ProcessGroup", "create_process_group"]

BACKEND = "mpi4py"


@no_compile_methods
class ProcessGroup(Collectives, PointToPoint):
    """The ranks of an MPI communicator as a process group of torch.distributed, which makes it.

    Methods are torch's, with torch's arguments; every one but send and recv is collective.

    Raises:
        TypeError, ValueError: arguments that no rank can use, or that this one cannot.
        CollectiveMismatchError: on every rank that could, if not all were about to do the same.
        CollectiveTimeoutError: the other ranks did not come within the group's timeout.
    """

    def __init__(self, comm: Any, timeout: timedelta, *, is_world: bool = False, store: Any = None) -> None:
        check_timeout(timeout)
        super().__init__(comm, timeout)
        self._is_world = is_world
        self._store = rendezvous.late_store(store)  # torch keeps its C++ half alone
        self._layer_group: Communicator | None = None
        self._name = self._description = ""

    @property
    def communicator(self) -> Communicator:
        """That of synchronized layers in this group; its messages never meet those of the group itself."""
        if self._layer_group is None:
            self._layer_group = resolve(None) if self._is_world else _OwnBackendCommunicator(self)
        return self._layer_group

    def shutdown(self) -> None:
        """Wait for what was begun, and free the communicators, which MPI_Finalize may have done already.

        Collective: every rank must call.
        """
        if self._collective_group.comm is None:
            return
        if self._is_world and self._store is not None:
            self._store.close()
        self._collective_thread.close()
        abandoned = bool(self._unusable)
        for message in list(self._pending):
            if self._collective_group._is_finalized() or not message.is_completed():
                fingerprint.abandon(message)
        self._unusable = self._unusable or "this process group was destroyed"
        if abandoned:  # messages are still under way in it
            # other ranks may have freed it: nobody waits for them at the end
            self._collective_group.presence.end()
            return
        if self._layer_group is not None and not self._is_world:
            self._layer_group.free()
        self._collective_group.free()
        if self._is_world:
            rendezvous.forget()

    abort = shutdown

    def split_group(
        self, ranks: list[int], timeout: Any = None, *args: Any, **kwargs: Any
    ) -> ProcessGroup | None:
        """The group of some of these ranks, for those who are in it; None for others."""
        self._collective_thread.drain()
        if self.rank() not in ranks:
            return None
        return ProcessGroup(
            subset(self._collective_group.ready().comm, sorted(ranks)), timeout or self._timeout
        )

    # Torch asks the backend of a device for these.

    supports_splitting = False

    def _get_backend(self, device: Any) -> ProcessGroup:
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
    """A communicator for synchronized layers, made at their first exchange."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group._collective_group.ready().comm)
        self._group = group

    def _make(self) -> Any:
        self._group._collective_thread.drain()  # one collective at a time, in the same order on every rank
        with self._group._collective_group.lock:
            return super()._make()


def create_process_group(options: Any, _: Any) -> ProcessGroup:
    """For torch.distributed, on the ranks of a new group."""
    launcher.refuse_if_apart(mpi())
    source, ranks = rendezvous.world_comm(), list(options.global_ranks_in_group)
    rank, size = (source.rank, source.size) if not ranks else (ranks.index(source.rank), len(ranks))
    if (options.group_rank, options.group_size) != (rank, size):
        raise ValueError(
            f"torch.distributed calls this rank {options.group_rank} of {options.group_size}, MPI {rank} of "
            f"{size}: unset RANK and WORLD_SIZE, or start the ranks with mpiexec or srun alone"
        )
    comm = source.Dup() if not ranks else subset(source, ranks)
    return ProcessGroup(comm, options.timeout, is_world=not ranks, store=options.store)
