"""One collective of a process group: the ranks agree on what they are about to do, then do it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import fingerprint, profiling
from ..comm.communicator import Communicator, mpi
from ..errors import CollectiveTimeoutError, MPISyncBNError, on_rank
from ..liveness import watchdog
from .work import CollectiveThread, Work, wait_until

__all__ = ["DEFAULT", "Action", "CheckedProcessGroup", "GroupCall", "check_same", "dtypes_and_shapes"]

Action = Callable[[Any], None]  # what to do with the MPI communicator, once the ranks agree


class GroupCall(NamedTuple):
    """What one rank is about to do: the same on every rank, or the collective is refused.

    Words, and dtypes with shapes of tensors; put together only where an error asks for it.
    """

    operation: str
    about: tuple[Any, ...] = ()

    def __str__(self) -> str:
        words = [
            f"{str(each[0]).removeprefix('torch.')} {tuple(each[1])}"
            if isinstance(each, tuple)
            else str(each)
            for each in self.about
        ]
        return " ".join([self.operation, *words])


def dtypes_and_shapes(tensors: Any) -> tuple[Any, ...]:
    """What a GroupCall says of tensors."""
    return tuple([(tensor.dtype, tensor.shape) for tensor in tensors])


def check_same(what: str, one: Any, other: Any) -> None:
    if one != other:
        raise ValueError(f"expected {what} to be alike, got {one} and {other}")


class _Options:
    """What torch's options have where none are given."""

    asyncOp = True
    reduceOp = dist.ReduceOp.SUM
    rootRank = rootTensor = 0
    timeout = timedelta(milliseconds=-1)


DEFAULT = _Options()
_NONE = timedelta(0)
profiling.find_torch()


class CheckedProcessGroup(dist.ProcessGroup):
    """What every collective goes through.

    Args:
        comm: a communicator that nobody else uses, which this takes over.
        timeout: how long a rank waits for the others.
    """

    def __init__(self, comm: Any, timeout: timedelta) -> None:
        self._collective_group = Communicator(comm)._adopt(comm)
        super().__init__(self._collective_group.rank, self._collective_group.size)  # type: ignore[call-arg]
        self._timeout = timeout
        self._collective_thread = CollectiveThread("mpisyncbn collectives")
        self._unusable = ""
        self._fingerprint_message = np.zeros(2)
        self._thread_multiple = mpi().Query_thread() == mpi().THREAD_MULTIPLE
        # The watchdog is to notice where a rank has left; the time to wait is the group's own.
        presence = self._collective_group.presence
        presence.channel, presence.limit = self._collective_group.comm.Dup(), 0.0
        watchdog.watch(presence)

    def _run(
        self, operation: str, prepare: Callable[[], tuple[tuple[Any, ...], Action]], result: Any, opts: Any
    ) -> Work:
        """Prepare, agree on the step, then act. Where one rank cannot prepare, all ranks learn it.

        ``prepare`` returns what its GroupCall is about and the action, or raises TypeError or ValueError.
        """
        self._check_usable(operation)
        action: Action | None = None
        problem: Exception | None = None
        try:
            about, action = prepare()
            step = GroupCall(operation, about)
        except Exception as error:  # whatever it is, the other ranks must not wait
            problem = error
            step = GroupCall(operation, (f"refused: {error}",))
        timeout = opts.timeout
        seconds = (timeout if timeout > _NONE else self._timeout).total_seconds()

        def perform() -> None:
            with self._collective_group.lock, torch.no_grad():
                self._collective_group.presence.doing = step
                try:
                    self._check_same_call(step, seconds)
                    if isinstance(problem, (TypeError, ValueError)):
                        raise type(problem)(f"{operation}: {problem}{on_rank()}") from problem
                    if problem is not None:
                        raise problem
                    self._call_mpi(step, action)
                finally:
                    self._collective_group.presence.doing = None

        if not self._collective_thread.is_current_thread():
            if opts.asyncOp and self._thread_multiple:
                if profiling.profiler._is_profiler_enabled:
                    perform = profiling.in_background(f"mpi4py:{operation}", perform)
                return self._collective_thread.submit(perform, Work(result, step))
            self._collective_thread.drain()
        if profiling.profiler._is_profiler_enabled:
            with profiling.record(f"mpi4py:{operation}"):
                perform()
        else:
            perform()
        return Work.done(result, step)

    def _check_same_call(self, step: GroupCall, seconds: float) -> None:
        group, message = self._collective_group, self._fingerprint_message
        self._check_usable(step.operation)  # it may have become so while this waited for its turn
        group.ready().presence.exchanges += 1
        h = fingerprint.fingerprint(step, group.exchanges)
        message[0], message[1] = h, h * h
        request = self._call_mpi(step, lambda comm: comm.Iallreduce(group.in_place, message))
        try:
            here = wait_until(request.Test, seconds)
        except BaseException:  # an interrupt
            fingerprint.abandon(request, message)
            self._unusable = f"this process group is unusable since {step} was interrupted"
            raise
        if not here:
            fingerprint.abandon(request, message)
            self._unusable = f"this process group is unusable since {step} timed out"
            raise CollectiveTimeoutError(
                f"{step}: rank {group.rank} of {group.size} waited {seconds:g} s for the other ranks of its "
                f"group, in collective number {group.exchanges}. Some rank does something else, is late or "
                "gone: mpisyncbn.distributed.monitored_barrier() says which, and timeout= of "
                "init_process_group or new_group how long to wait"
            )
        fingerprint.check(group, message[0], message[1], step)

    def _call_mpi(self, step: GroupCall, action: Any) -> Any:
        try:
            return action(self._collective_group.comm)
        except self._collective_group.mpi_error as error:
            raise MPISyncBNError(f"MPI failed in {step}{on_rank()}: {error}") from error

    def _check_usable(self, operation: str) -> None:
        if self._unusable:
            raise MPISyncBNError(f"{operation}: {self._unusable}{on_rank()}")

    # What arguments must be.

    def _root(self, opts: Any) -> int:
        root = int(opts.rootRank)
        if not 0 <= root < self._collective_group.size:
            raise ValueError(f"expected a root from 0 to {self._collective_group.size - 1}, got {root}")
        return root

    def _check_one_per_rank(self, parts: Any, like: Tensor | None) -> None:
        if len(parts) != self._collective_group.size:
            raise ValueError(
                f"expected one tensor for each of {self._collective_group.size} ranks, got {len(parts)}"
            )
        if like is not None:
            for part in parts:
                check_same("the dtypes of input and output", part.dtype, like.dtype)

    def _splits(self, values: Tensor, splits: Any) -> list[int]:
        """Bytes for each rank, from a number of rows for each or, where there is none, equal parts."""
        size, rows = self._collective_group.size, values.shape[0] if values.ndim else 1
        if not splits:
            if rows % size:
                raise ValueError(f"expected rows for {size} equal parts, got {rows}")
            splits = [rows // size] * size
        if len(splits) != size or sum(splits) != rows or min(splits) < 0:
            raise ValueError(f"expected {size} splits with a sum of {rows} rows, got {list(splits)}")
        return [count * (values.nbytes // max(rows, 1)) for count in splits]


def as_list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
