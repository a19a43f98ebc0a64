"""Messages from one rank to another: send, recv, and the barrier that names missing ranks."""

# mypy: disable-error-code="override, assignment"
# Torch overloads these methods, but calls them only in the forms that are defined here.

from __future__ import annotations

import contextlib
import threading
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from torch import Tensor

from .. import profiling
from ..arguments import check_timeout
from ..comm.runtime import mpi
from ..errors import CollectiveTimeoutError, on_rank
from .checked import CheckedProcessGroup, GroupCall, Tensors, as_list, dtypes_and_shapes, failure_of
from .host_tensors import contiguous, copy_back, host_output_for, prepare_outputs, to_cpu
from .mpi_collectives import OWN_TAG, irecv, isend
from .no_compile import no_compile_methods
from .work import Work, wait_until

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["PointToPoint"]

_ONE_BYTE = np.zeros(1, np.uint8)  # the message of monitored_barrier


@no_compile_methods
class PointToPoint(CheckedProcessGroup):
    """The methods of a process group that send from one rank to another."""

    def __init__(self, comm: MPI.Intracomm, timeout: timedelta) -> None:
        super().__init__(comm, timeout)
        self._pending: set[PointToPointWork] = set()  # MPI still reads or writes their memory

    def send(self, tensors: Tensors, to: int, tag: int = 0) -> Work:
        return self._begin("send", tensors, to, tag)

    def recv(self, tensors: Tensors, source: int, tag: int = 0) -> Work:
        return self._begin("recv", tensors, source, tag)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Work:
        return self._begin("recv", tensors, mpi().ANY_SOURCE, tag)

    def _begin(self, operation: str, tensors: Tensors, peer: int, tag: int) -> Work:
        """Begin to "send" one tensor to the rank ``peer``, or to "recv" one from it."""
        self._check_usable(operation)
        self._collective_group.ready()
        (tensor,) = as_list(tensors)
        self._check_peer(operation, peer, tag)
        who = "anyone" if peer == mpi().ANY_SOURCE else f"rank {peer}"
        about = (who, "of", *dtypes_and_shapes([tensor]), "with tag", tag)
        if operation == "send":
            call, host = GroupCall("send", ("to", *about)), contiguous(to_cpu(tensor))
            start, received = isend, None
        else:
            call, host = GroupCall("recv", ("from", *about)), host_output_for(tensor)
            start, received = irecv, tensor
            prepare_outputs(tensor)
        with self._mpi_lock():
            requests = self._call_mpi(call, lambda comm: start(comm, host, peer, tag))
        work = PointToPointWork(self, call, requests, host, received)
        for other in list(self._pending):
            other.is_completed()  # a completed one removes itself from the set
        self._pending.add(work)  # the caller may drop it before it is done
        return work

    def _check_peer(self, operation: str, peer: int, tag: int) -> None:
        """Raise ValueError unless messages can go to or come from ``peer`` with ``tag``."""
        if peer != mpi().ANY_SOURCE and not 0 <= peer < self.size():
            raise ValueError(
                f"{operation}: expected a rank from 0 to {self.size() - 1}, got {peer}{on_rank()}: pass a "
                "rank in the group"
            )
        largest: int = self._collective_group.comm.Get_attr(mpi().TAG_UB)
        if not 0 <= tag <= largest or tag == OWN_TAG:
            raise ValueError(
                f"{operation}: expected a tag from 0 to {largest} other than {OWN_TAG}, which is taken, "
                f"got {tag}{on_rank()}: choose another one"
            )

    def _mpi_lock(self) -> AbstractContextManager[object]:
        """Return the lock under which to call MPI while a collective may be running.

        With THREAD_MULTIPLE there is none; below it, MPI takes one call at a time.
        """
        return contextlib.nullcontext() if self._thread_multiple else self._collective_group.lock

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait for all ranks, at most for ``timeout``; None: the group's.

        Raises CollectiveTimeoutError, which says on rank 0 which ranks did not come.
        Collective: every rank must call.
        """
        self._check_usable("monitored_barrier")
        timeout = self._timeout if timeout is None else timeout
        check_timeout(timeout)
        seconds = timeout.total_seconds()
        self._collective_thread.drain()
        group = self._collective_group.ready()
        with self._mpi_lock():
            missing = _wait_for_each(group.comm, seconds)
        if missing:
            self._unusable = "this process group is unusable since monitored_barrier timed out"
            who = f"ranks {missing}" if group.rank == 0 else "rank 0, or another rank it waits for,"
            raise CollectiveTimeoutError(
                f"monitored_barrier: {who} did not come within {seconds:g} s{on_rank()}: look where "
                "they are. If they are only slow, timeout= gives them more time"
            )


def _wait_for_each(comm: MPI.Intracomm, seconds: float) -> list[int]:
    """Tell rank 0 that this rank is here, and wait until rank 0 says that all are.

    Return the ranks that did not come within ``seconds``; on other ranks that can only be rank 0.
    Collective: every rank must call.
    """
    message = [_ONE_BYTE, 1, mpi().BYTE]
    others = range(1, comm.size) if comm.rank == 0 else [0]
    if comm.rank > 0:
        comm.Isend(message, 0, OWN_TAG).Free()
    receives = {rank: comm.Irecv(message, rank, OWN_TAG) for rank in others}

    def all_arrived() -> bool:
        for rank in [rank for rank, receive in receives.items() if receive.Test()]:
            del receives[rank]
        return not receives

    if wait_until(all_arrived, seconds) and comm.rank == 0:
        for rank in others:
            comm.Send(message, rank, OWN_TAG)
    for receive in receives.values():
        receive.Cancel()
    return list(receives)


@no_compile_methods
class PointToPointWork(Work):
    """A message under way from one rank to another. Any call of MPI lets it make progress.

    Args:
        group: the process group that it belongs to.
        call: what errors call it.
        requests: MPI's requests, one for each piece of the message.
        host: the memory that MPI reads or writes, kept until it is done.
        received: the tensor to receive into; None: this rank sends.
    """

    def __init__(
        self,
        group: PointToPoint,
        call: GroupCall,
        requests: list[MPI.Request],
        host: Tensor,
        received: Tensor | None,
    ) -> None:
        super().__init__([host if received is None else received], call)
        self._polling = threading.Lock()
        self._group, self._requests, self._host, self._received = group, requests, host, received
        profiled = profiling.profiler._is_profiler_enabled
        self._end_profiling = profiling.begin(f"mpi4py:{call.operation}") if profiled else None

    def is_completed(self) -> bool:
        with self._polling:  # MPI lets one thread at a time test a request
            if not self._done.is_set():
                MPI, status = mpi(), mpi().Status()
                try:
                    if not all(request.Test(status) for request in self._requests):
                        return False
                except MPI.Exception as error:
                    self.complete(failure_of(self._call, error))
                    return True
                self._complete_message(status)
        return True

    def _cancel(self, error: Exception) -> None:
        """Complete with ``error``, and cancel a receive, or it would take the next message."""
        with self._polling:
            if not self._done.is_set() and self._received is not None:
                for request in self._requests:
                    request.Cancel()
                    request.Wait()
                self.complete(error)

    def _complete_message(self, status: MPI.Status) -> None:
        """Check the length of what was received, copy it to its tensor, and complete."""
        error = None
        if self._received is not None:
            self._source = status.Get_source()
            length, expected = status.Get_count(mpi().BYTE), self._host.nbytes
            if len(self._requests) == 1 and length != expected:
                error = ValueError(
                    f"{self._call}: expected {expected} bytes, {length} came{on_rank()}: receive as many as "
                    "are sent"
                )
            else:
                copy_back(self._host, self._received)
        self.complete(error)

    def complete(self, error: BaseException | None = None) -> None:
        self._group._pending.discard(self)
        if self._end_profiling is not None:
            self._end_profiling()
        super().complete(error)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it is done, and return True.

        Raises CollectiveTimeoutError after ``timeout``; None or zero: the group's.
        """
        seconds = (timeout if timeout and timeout > timedelta(0) else self._group._timeout).total_seconds()
        if not wait_until(self.is_completed, seconds):
            error = CollectiveTimeoutError(
                f"{self._call}: nothing for {seconds:g} s{on_rank()}: look where the other rank is. "
                "If it is only slow, timeout= gives it more time"
            )
            self._cancel(error)
            raise error
        return super().wait()

    def get_future(self) -> NoReturn:
        raise NotImplementedError(f"{self._call}: messages from rank to rank have no future: wait() for them")
