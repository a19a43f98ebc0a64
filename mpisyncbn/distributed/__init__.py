"""torch.distributed over MPI: the backend ``mpi4py``, on which stock DistributedDataParallel runs.

    import mpisyncbn

    mpisyncbn.init_process_group()     # or: import mpisyncbn.distributed, and
                                       # torch.distributed.init_process_group("mpi4py")

There is no address to agree on and no variable to set. Every collective begins with a message of two numbers,
the fingerprint of what this rank is about to do: ranks that disagree get CollectiveMismatchError, with the
list of who did what, and ranks that wait too long CollectiveTimeoutError. Then come the values, in one call
of MPI. Collectives with ``async_op=True``, and those of DistributedDataParallel, run on a thread of their
process group, beside the backward pass; that takes MPI_THREAD_MULTIPLE, mpi4py's default.

A collective goes collectives.py -> steps.py -> buffers.py -> MPI, by way of progress.py if in the background.
"""

# mypy: disable-error-code="override, assignment"
# Torch calls these with lists and options alone, and has names for the other ways to call it.

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import fingerprint, profiling
from ..arguments import check_timeout
from ..comm import launcher
from ..comm.communicator import Communicator, mpi, resolve, subset
from ..errors import CollectiveTimeoutError, MPISyncBNError, on_rank
from . import host_tensors, rendezvous
from .agreement import Step, listed, seen
from .collectives import Collectives
from .joining import join
from .opaque import opaque, opaque_methods
from .work import Work, keep_works_of_reducers, patiently

__all__ = ["BACKEND", "ProcessGroup", "init_process_group", "join", "monitored_barrier"]

BACKEND = "mpi4py"
_NOTE = np.zeros(1, np.uint8)  # that a rank is here


@opaque_methods
class ProcessGroup(Collectives):
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
        self._communicator: Communicator | None = None
        self._messages: set[Message] = set()  # under way
        self._name = self._description = ""

    @property
    def communicator(self) -> Communicator:
        """That of synchronized layers in this group; its messages never meet those of the group itself."""
        if self._communicator is None:
            self._communicator = resolve(None) if self._is_world else _OfGroup(self)
        return self._communicator

    # From one rank to another.

    def send(self, tensors: Any, to: int, tag: int = 0) -> Work:
        return self._message("send", tensors, to, tag)

    def recv(self, tensors: Any, source: int, tag: int = 0) -> Work:
        return self._message("recv", tensors, source, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Work:
        return self._message("recv", tensors, mpi().ANY_SOURCE, tag)

    def _message(self, operation: str, tensors: Any, peer: int, tag: int) -> Work:
        self._check_usable(operation)
        self._wire.ready()
        (tensor,) = listed(tensors)
        if peer != mpi().ANY_SOURCE and not 0 <= peer < self.size():
            raise ValueError(
                f"{operation}: expected a rank from 0 to {self.size() - 1}, got {peer}{on_rank()}"
            )
        sends = operation == "send"
        host = host_tensors.contiguous(host_tensors.staged(tensor)) if sends else host_tensors.like(tensor)
        start = host_tensors.sending if sends else host_tensors.receiving
        who = "anyone" if peer == mpi().ANY_SOURCE else f"rank {peer}"
        what = Step(operation, ("to" if sends else "from", who, "of", *seen([tensor]), "with tag", tag))
        with self._beside():
            requests = self._call(what, lambda comm: start(comm, host, peer, tag))
        message = Message(self, what, requests, host, None if sends else tensor)
        for other in list(self._messages):
            other.is_completed()
        self._messages.add(message)  # until it has gone, also where the caller drops it: MPI reads there
        return message

    def _beside(self) -> Any:
        """What calls of MPI need beside a collective: nothing, or below THREAD_MULTIPLE its end."""
        return contextlib.nullcontext() if self._threads else self._wire.lock

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier in which rank 0 says who did not come within ``timeout``; None: the group's."""
        self._check_usable("monitored_barrier")
        timeout = self._timeout if timeout is None else timeout
        check_timeout(timeout)
        seconds = timeout.total_seconds()
        self._engine.drain()
        group, byte = self._wire.ready(), mpi().BYTE
        others = range(1, group.size) if group.rank == 0 else [0]
        with self._beside():
            if group.rank > 0:
                group.comm.Isend([_NOTE, 1, byte], 0, host_tensors.OWN_TAG).Free()
            here = {rank: group.comm.Irecv([_NOTE, 1, byte], rank, host_tensors.OWN_TAG) for rank in others}
            arrived: set[int] = set()

            def everybody() -> bool:
                arrived.update(rank for rank in here if rank not in arrived and here[rank].Test())
                return len(arrived) == len(here)

            if patiently(everybody, seconds):
                if group.rank == 0:
                    for rank in others:
                        group.comm.Send([_NOTE, 1, byte], rank, host_tensors.OWN_TAG)
                return
            missing = [rank for rank in here if rank not in arrived]
            for rank in missing:
                here[rank].Cancel()
        self._unusable = "this process group is unusable since monitored_barrier timed out"
        who = f"ranks {missing}" if group.rank == 0 else "rank 0, or another rank it waits for,"
        raise CollectiveTimeoutError(f"monitored_barrier: {who} did not come within {seconds:g} s{on_rank()}")

    # The group itself.

    def shutdown(self) -> None:
        """Wait for what was begun, and free the communicators, which MPI_Finalize may have done already.

        Collective: every rank must call.
        """
        if self._wire.comm is None:
            return
        if self._is_world and self._store is not None:
            self._store.close()
        self._engine.close()
        abandoned = bool(self._unusable)
        for message in list(self._messages):
            if self._wire._is_finalized() or not message.is_completed():
                fingerprint.abandon(message)
        self._unusable = self._unusable or "this process group was destroyed"
        if abandoned:  # messages are still under way in it
            self._wire.presence.end()  # other ranks may have freed it: nobody waits for them at the end
            return
        if self._communicator is not None and not self._is_world:
            self._communicator.free()
        self._wire.free()
        if self._is_world:
            rendezvous.forget()

    abort = shutdown

    def split_group(
        self, ranks: list[int], timeout: Any = None, *args: Any, **kwargs: Any
    ) -> ProcessGroup | None:
        """The group of some of these ranks, for those who are in it; None for others."""
        self._engine.drain()
        if self.rank() not in ranks:
            return None
        return ProcessGroup(subset(self._wire.ready().comm, sorted(ranks)), timeout or self._timeout)

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


class _OfGroup(Communicator):
    """A communicator for synchronized layers, made at their first exchange."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group._wire.ready().comm)
        self._group = group

    def _make(self) -> Any:
        self._group._engine.drain()  # one collective at a time, in the same order on every rank
        with self._group._wire.lock:
            return super()._make()


@opaque_methods
class Message(Work):
    """Messages under way from one rank to another; they go on whenever MPI is called."""

    def __init__(
        self, group: ProcessGroup, what: Step, requests: list[Any], host: Tensor, tensor: Tensor | None
    ) -> None:
        super().__init__([host if tensor is None else tensor], what)
        self._polling = threading.Lock()
        self._group, self._requests, self._host, self._tensor = group, requests, host, tensor
        profiled = profiling.profiler._is_profiler_enabled
        self._end = profiling.begin(f"mpi4py:{what.operation}") if profiled else None

    def is_completed(self) -> bool:
        with self._polling:  # MPI lets one thread at a time ask for a request
            if not self._over.is_set():
                MPI, status = mpi(), mpi().Status()
                try:
                    if not all(request.Test(status) for request in self._requests):
                        return False
                except MPI.Exception as error:
                    self.finish(MPISyncBNError(f"MPI failed in {self._what}{on_rank()}: {error}"))
                    return True
                self._arrived(status)
        return True

    def _give_up(self, error: Exception) -> None:
        """Take the receive back: it would get the next message otherwise."""
        with self._polling:
            if not self._over.is_set() and self._tensor is not None:
                for request in self._requests:
                    request.Cancel()
                    request.Wait()
                self.finish(error)

    def _arrived(self, status: Any) -> None:
        error = None
        if self._tensor is not None:
            self._source = status.Get_source()
            came, most = status.Get_count(mpi().BYTE), self._host.nbytes
            if len(self._requests) == 1 and came != most:
                error = ValueError(f"{self._what}: expected {most} bytes, {came} came{on_rank()}")
            else:
                host_tensors.put_back(self._host, self._tensor)
        self.finish(error)

    def finish(self, error: BaseException | None = None) -> None:
        self._group._messages.discard(self)
        if self._end is not None:
            self._end()
        super().finish(error)

    def wait(self, timeout: timedelta | None = None) -> bool:
        seconds = (timeout if timeout and timeout > timedelta(0) else self._group._timeout).total_seconds()
        if not patiently(self.is_completed, seconds):
            error = CollectiveTimeoutError(f"{self._what}: nothing for {seconds:g} s{on_rank()}")
            self._give_up(error)
            raise error
        return super().wait()

    def get_future(self) -> Any:
        raise NotImplementedError(f"{self._what}: messages from rank to rank have no future: wait() for them")


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
    with rendezvous.over(source):
        dist.init_process_group(BACKEND, init_method="mpi4py://", timeout=timeout)


@opaque()
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


def _create(options: Any, _: Any) -> ProcessGroup:
    """For torch.distributed, on the ranks of a new group."""
    launcher.refuse_if_apart(mpi())
    source, ranks = rendezvous.source(), list(options.global_ranks_in_group)
    rank, size = (source.rank, source.size) if not ranks else (ranks.index(source.rank), len(ranks))
    if (options.group_rank, options.group_size) != (rank, size):
        raise ValueError(
            f"torch.distributed calls this rank {options.group_rank} of {options.group_size}, MPI {rank} of "
            f"{size}: unset RANK and WORLD_SIZE, or start the ranks with mpiexec or srun alone"
        )
    comm = source.Dup() if not ranks else subset(source, ranks)
    return ProcessGroup(comm, options.timeout, is_world=not ranks, store=options.store)


if BACKEND not in dist.Backend.backend_list:
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
    rendezvous.register(BACKEND)
    keep_works_of_reducers()
