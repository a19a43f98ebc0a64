"""The base of every collective: the ranks compare what they are about to do, then do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from .. import fingerprint, profiling
from ..arguments import LONGEST_TIMEOUT
from ..comm.communicator import Communicator
from ..comm.runtime import mpi
from ..errors import CollectiveTimeoutError, MPISyncBNError, on_rank
from ..liveness import watchdog
from ..liveness.pending import keep_alive
from ..torch_versions import is_async
from .host_tensors import prepare_outputs
from .work import CollectiveThread, Work, wait_until

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "DEFAULT",
    "CheckedProcessGroup",
    "GroupCall",
    "Prepared",
    "Tensors",
    "as_list",
    "check_same",
    "dtypes_and_shapes",
    "failure_of",
]

T = TypeVar("T")
Tensors = Tensor | Sequence[Tensor]
Action = Callable[["MPI.Intracomm"], object]  # calls MPI, once the ranks agree
Prepared = tuple[tuple[object, ...], Action]  # `about` of a GroupCall, and the action


class GroupCall(NamedTuple):
    """The call of one rank in a group. In a collective, the calls of all ranks must be equal.

    ``about`` holds words, numbers, and a (dtype, shape) for each tensor. They become text
    only if an error needs it.
    """

    operation: str
    about: tuple[object, ...] = ()

    def __str__(self) -> str:
        words = [
            f"{str(each[0]).removeprefix('torch.')} {tuple(each[1])}"
            if isinstance(each, tuple)
            else str(each)
            for each in self.about
        ]
        return " ".join([self.operation, *words])


def dtypes_and_shapes(tensors: Sequence[Tensor]) -> tuple[tuple[torch.dtype, torch.Size], ...]:
    """The dtype and shape of each tensor, for a GroupCall."""
    return tuple([(tensor.dtype, tensor.shape) for tensor in tensors])


def as_list(tensors: Tensors) -> list[Tensor]:
    """One tensor or several, as a list."""
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def check_same(what: str, one: object, other: object) -> None:
    """Raise ValueError if ``one`` and ``other`` differ; ``what`` names both in the error."""
    if one != other:
        raise ValueError(
            f"expected {what} to be equal, got {one} and {other}: make each output like its input, in dtype "
            "and number of values"
        )


class Options(Protocol):
    """The fields that all option classes of torch.distributed have."""

    asyncOp: bool
    timeout: timedelta


class _DefaultOptions:
    """The values that torch's option classes have by default."""

    asyncOp = True
    reduceOp = dist.ReduceOp.SUM
    rootRank = rootTensor = 0
    timeout = timedelta(milliseconds=-1)


DEFAULT: Any = _DefaultOptions()  # stands for an instance of any option class
_ZERO = timedelta(0)
profiling.find_torch()


class CheckedProcessGroup(dist.ProcessGroup):
    """A process group whose ranks compare their calls before each collective.

    Args:
        comm: a communicator for this object alone, which owns it from now on.
        timeout: how long a rank waits for the others. ``MPISYNCBN_TIMEOUT``, if set, is used in
            place of torch's default, 30 minutes.
    """

    def __init__(self, comm: MPI.Intracomm, timeout: timedelta) -> None:
        self._collective_group = Communicator(comm)._take_over(comm)
        super().__init__(self._collective_group.rank, self._collective_group.size)  # type: ignore[call-arg]
        self._timeout = _default_timeout(self._collective_group) if timeout == default_pg_timeout else timeout
        self._collective_thread = CollectiveThread("mpisyncbn collectives")
        self._unusable = ""  # why the group cannot be used any more
        self._fingerprint_message = np.zeros(2)
        self._thread_multiple = mpi().Query_thread() == mpi().THREAD_MULTIPLE
        # The watchdog looks only for ranks that have left: the time to wait is this group's own.
        rank_status = self._collective_group.rank_status
        rank_status.p2p_comm, rank_status.timeout = self._collective_group.comm.Dup(), 0.0
        watchdog.watch(rank_status)

    def _run(self, operation: str, prepare: Callable[[], Prepared], result: object, opts: Options) -> Work:
        """Run a collective: prepare, compare the calls of all ranks, then act.

        ``prepare`` raises TypeError or ValueError if this rank cannot use its arguments. Such
        a rank compares its call as well, so that all ranks learn of it and none is left waiting.
        Collective: every rank must call.
        """
        self._check_usable(operation)
        try:
            about, action = prepare()
            prepare_outputs(result)
            call = GroupCall(operation, about)
        except Exception as error:  # of any type: the other ranks must not wait
            call = GroupCall(operation, (f"refused: {error}",))
            action = partial(_refuse, operation, error)
        timeout = opts.timeout
        seconds = (timeout if timeout > _ZERO else self._timeout).total_seconds()

        def perform() -> None:
            with self._collective_group.lock, torch.no_grad():
                self._collective_group.rank_status.current_call = call
                try:
                    self._check_same_call(call, seconds)
                    self._call_mpi(call, action)
                finally:
                    self._collective_group.rank_status.current_call = None

        if not self._collective_thread.is_current_thread():
            if is_async(opts) and self._thread_multiple:
                if profiling.profiler._is_profiler_enabled:
                    perform = profiling.in_background(f"mpi4py:{operation}", perform)
                return self._collective_thread.submit(perform, Work(result, call).keep_for_cpp())
            self._collective_thread.drain()
        if profiling.profiler._is_profiler_enabled:
            with profiling.record(f"mpi4py:{operation}"):
                perform()
        else:
            perform()
        return Work.completed(result, call).keep_for_cpp()

    def _check_same_call(self, call: GroupCall, seconds: float) -> None:
        """Return once all ranks are about to make this call.

        Raises CollectiveMismatchError on every rank if some make another call, and
        CollectiveTimeoutError if some do not come within ``seconds``.
        Collective: every rank must call.
        """
        group, message = self._collective_group, self._fingerprint_message
        self._check_usable(call.operation)  # an earlier one may have failed since _run looked
        group.ready().rank_status.exchanges += 1
        h = fingerprint.fingerprint(call, group.exchanges)
        message[0], message[1] = h, h * h
        request = self._call_mpi(call, lambda comm: comm.Iallreduce(group.in_place, message))
        try:
            all_here = wait_until(request.Test, seconds)
        except BaseException:  # an interrupt
            keep_alive(request, message)
            self._unusable = f"this process group is unusable since {call} was interrupted"
            raise
        if not all_here:
            keep_alive(request, message)
            self._unusable = f"this process group is unusable since {call} timed out"
            raise CollectiveTimeoutError(
                f"{call}: rank {group.rank} of {group.size} waited {seconds:g} s for the other ranks of its "
                f"group, in collective number {group.exchanges}. All ranks must make the same collectives in "
                "the same order. If some rank is only slow, MPISYNCBN_TIMEOUT=<seconds>, or timeout= of "
                f"init_process_group or new_group, gives it more time.\n{group.rank_status.ask_others()}"
            )
        fingerprint.check(group, message[0], message[1], call)

    def _call_mpi(self, call: GroupCall, action: Callable[[MPI.Intracomm], T]) -> T:
        """Return what ``action`` returns. Errors of MPI become an MPISyncBNError with the call."""
        try:
            return action(self._collective_group.comm)
        except self._collective_group.mpi_error as error:
            raise failure_of(call, error) from error

    def _check_usable(self, operation: str) -> None:
        """Raise MPISyncBNError if the group was destroyed, or some rank has given up in it."""
        waited = self._collective_group.rank_status.asked_by
        if waited is not None and not self._unusable:
            self._unusable = f"this process group is unusable since rank {waited} waited too long in it"
        if self._unusable:
            raise MPISyncBNError(f"{operation}: {self._unusable}{on_rank()}")

    def _check_root(self, root: int) -> int:
        """Return ``root`` if it is a rank of this group; raise ValueError if not."""
        if not 0 <= root < self._collective_group.size:
            most = self._collective_group.size - 1
            raise ValueError(f"expected a root from 0 to {most}, got {root}: pass its rank in the group")
        return root

    def _check_one_per_rank(self, parts: Sequence[object]) -> None:
        """Raise ValueError unless ``parts`` has one entry for each rank."""
        size = self._collective_group.size
        if len(parts) != size:
            raise ValueError(f"expected a list of {size} tensors, one for each rank, got {len(parts)}")

    def _check_one_tensor_per_rank(self, parts: Sequence[Tensor], other: Tensor) -> None:
        """Raise ValueError unless ``parts`` has a tensor of ``other``'s dtype for each rank."""
        self._check_one_per_rank(parts)
        for part in parts:
            check_same("the dtypes of input and output", part.dtype, other.dtype)

    def _check_part_per_rank(self, whole: Tensor, part: Tensor) -> None:
        """Raise ValueError unless ``whole`` is as long as one ``part`` per rank, in its dtype."""
        size = self._collective_group.size
        check_same(
            f"the sizes of the whole and of {size} parts of {part.numel()}",
            whole.numel(),
            size * part.numel(),
        )
        check_same("the dtypes of output and input", whole.dtype, part.dtype)

    def _split_bytes(self, values: Tensor, splits: Sequence[int] | None) -> list[int]:
        """Return the number of bytes of ``values`` for each rank.

        ``splits`` is the number of rows for each rank; without it, all ranks get equally many.
        Raises ValueError if the rows cannot be split so.
        """
        size, rows = self._collective_group.size, values.shape[0] if values.ndim else 1
        if not splits:
            if rows % size:
                raise ValueError(f"expected rows for {size} equal parts, got {rows}: pass split sizes")
            splits = [rows // size] * size
        if len(splits) != size or sum(splits) != rows or min(splits) < 0:
            raise ValueError(f"expected {size} split sizes with a sum of {rows} rows, got {list(splits)}")
        return [count * (values.nbytes // max(rows, 1)) for count in splits]


def failure_of(call: object, error: MPI.Exception) -> MPISyncBNError:
    """The error of a call in which MPI failed."""
    too_long = error.Get_error_class() == mpi().ERR_TRUNCATE
    cure = ": the message is longer than the tensor. Receive as many bytes as are sent" if too_long else ""
    return MPISyncBNError(f"MPI failed in {call}{on_rank()}: {error}{cure}")


def _default_timeout(group: Communicator) -> timedelta:
    """The timeout of a process group that was made without one, or with torch's default."""
    if not group.rank_status.timeout_is_given:
        return default_pg_timeout
    return timedelta(seconds=min(group.rank_status.timeout or LONGEST_TIMEOUT, LONGEST_TIMEOUT))


def _refuse(operation: str, problem: Exception, _: MPI.Intracomm) -> NoReturn:
    """The action of a rank that cannot use its arguments: raise what is wrong with them."""
    if isinstance(problem, (TypeError, ValueError)):
        raise type(problem)(f"{operation}: {problem}{on_rank()}") from problem
    raise problem
