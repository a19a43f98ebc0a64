"""Messages from one rank to another: send, recv, and the barrier that says who does not come."""

# mypy: disable-error-code="override, assignment"
# Torch calls these with lists and options alone, and has names for the other ways to call it.

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta
from typing import Any

import numpy as np
from torch import Tensor

from .. import profiling
from ..arguments import check_timeout
from ..comm.communicator import mpi
from ..errors import CollectiveTimeoutError, MPISyncBNError, on_rank
from . import host_tensors, mpi_collectives
from .checked import CheckedProcessGroup, GroupCall, as_list, dtypes_and_shapes
from .no_compile import no_compile_methods
from .work import Work, wait_until

__all__ = ["PointToPoint", "PointToPointWork"]

_PRESENT = np.zeros(1, np.uint8)  # that a rank is here


@no_compile_methods
class PointToPoint(CheckedProcessGroup):
    """The methods of a process group that send from one rank to another."""

    def __init__(self, comm: Any, timeout: timedelta) -> None:
        super().__init__(comm, timeout)
        self._pending: set[PointToPointWork] = set()  # under way

    def send(self, tensors: Any, to: int, tag: int = 0) -> Work:
        return self._start("send", tensors, to, tag)

    def recv(self, tensors: Any, source: int, tag: int = 0) -> Work:
        return self._start("recv", tensors, source, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Work:
        return self._start("recv", tensors, mpi().ANY_SOURCE, tag)

    def _start(self, operation: str, tensors: Any, peer: int, tag: int) -> Work:
        self._check_usable(operation)
        self._collective_group.ready()
        (tensor,) = as_list(tensors)
        if peer != mpi().ANY_SOURCE and not 0 <= peer < self.size():
            raise ValueError(
                f"{operation}: expected a rank from 0 to {self.size() - 1}, got {peer}{on_rank()}"
            )
        sends = operation == "send"
        host = (
            host_tensors.contiguous(host_tensors.to_cpu(tensor))
            if sends
            else host_tensors.host_output_for(tensor)
        )
        start = mpi_collectives.isend if sends else mpi_collectives.irecv
        who = "anyone" if peer == mpi().ANY_SOURCE else f"rank {peer}"
        what = GroupCall(
            operation, ("to" if sends else "from", who, "of", *dtypes_and_shapes([tensor]), "with tag", tag)
        )
        with self._mpi_lock():
            requests = self._call_mpi(what, lambda comm: start(comm, host, peer, tag))
        message = PointToPointWork(self, what, requests, host, None if sends else tensor)
        for other in list(self._pending):
            other.is_completed()
        self._pending.add(message)  # until it has gone, also where the caller drops it: MPI reads there
        return message

    def _mpi_lock(self) -> Any:
        """What calls of MPI need beside a collective: nothing, or below THREAD_MULTIPLE its end."""
        return contextlib.nullcontext() if self._thread_multiple else self._collective_group.lock

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier in which rank 0 says who did not come within ``timeout``; None: the group's."""
        self._check_usable("monitored_barrier")
        timeout = self._timeout if timeout is None else timeout
        check_timeout(timeout)
        seconds = timeout.total_seconds()
        self._collective_thread.drain()
        group, byte = self._collective_group.ready(), mpi().BYTE
        others = range(1, group.size) if group.rank == 0 else [0]
        with self._mpi_lock():
            if group.rank > 0:
                group.comm.Isend([_PRESENT, 1, byte], 0, mpi_collectives.OWN_TAG).Free()
            here = {
                rank: group.comm.Irecv([_PRESENT, 1, byte], rank, mpi_collectives.OWN_TAG) for rank in others
            }
            arrived: set[int] = set()

            def everybody() -> bool:
                arrived.update(rank for rank in here if rank not in arrived and here[rank].Test())
                return len(arrived) == len(here)

            if wait_until(everybody, seconds):
                if group.rank == 0:
                    for rank in others:
                        group.comm.Send([_PRESENT, 1, byte], rank, mpi_collectives.OWN_TAG)
                return
            missing = [rank for rank in here if rank not in arrived]
            for rank in missing:
                here[rank].Cancel()
        self._unusable = "this process group is unusable since monitored_barrier timed out"
        who = f"ranks {missing}" if group.rank == 0 else "rank 0, or another rank it waits for,"
        raise CollectiveTimeoutError(f"monitored_barrier: {who} did not come within {seconds:g} s{on_rank()}")


@no_compile_methods
class PointToPointWork(Work):
    """Messages under way from one rank to another; they go on whenever MPI is called."""

    def __init__(
        self, group: PointToPoint, what: GroupCall, requests: list[Any], host: Tensor, tensor: Tensor | None
    ) -> None:
        super().__init__([host if tensor is None else tensor], what)
        self._polling = threading.Lock()
        self._group, self._requests, self._host, self._tensor = group, requests, host, tensor
        profiled = profiling.profiler._is_profiler_enabled
        self._end = profiling.begin(f"mpi4py:{what.operation}") if profiled else None

    def is_completed(self) -> bool:
        with self._polling:  # MPI lets one thread at a time ask for a request
            if not self._done.is_set():
                MPI, status = mpi(), mpi().Status()
                try:
                    if not all(request.Test(status) for request in self._requests):
                        return False
                except MPI.Exception as error:
                    self.complete(MPISyncBNError(f"MPI failed in {self._what}{on_rank()}: {error}"))
                    return True
                self._complete_message(status)
        return True

    def _give_up(self, error: Exception) -> None:
        """Take the receive back: it would get the next message otherwise."""
        with self._polling:
            if not self._done.is_set() and self._tensor is not None:
                for request in self._requests:
                    request.Cancel()
                    request.Wait()
                self.complete(error)

    def _complete_message(self, status: Any) -> None:
        error = None
        if self._tensor is not None:
            self._source = status.Get_source()
            came, most = status.Get_count(mpi().BYTE), self._host.nbytes
            if len(self._requests) == 1 and came != most:
                error = ValueError(f"{self._what}: expected {most} bytes, {came} came{on_rank()}")
            else:
                host_tensors.copy_back(self._host, self._tensor)
        self.complete(error)

    def complete(self, error: BaseException | None = None) -> None:
        self._group._pending.discard(self)
        if self._end is not None:
            self._end()
        super().complete(error)

    def wait(self, timeout: timedelta | None = None) -> bool:
        seconds = (timeout if timeout and timeout > timedelta(0) else self._group._timeout).total_seconds()
        if not wait_until(self.is_completed, seconds):
            error = CollectiveTimeoutError(f"{self._what}: nothing for {seconds:g} s{on_rank()}")
            self._give_up(error)
            raise error
        return super().wait()

    def get_future(self) -> Any:
        raise NotImplementedError(f"{self._what}: messages from rank to rank have no future: wait() for them")
