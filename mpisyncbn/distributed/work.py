"""Work, which torch waits for, and the thread that runs a process group's collectives."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Work as _Work

from ..errors import CollectiveTimeoutError, MPISyncBNError, on_rank
from ..liveness import exits
from ..torch_versions import CPP_KEEPS_WORKS, work_of_cpp
from .no_compile import no_compile_methods

__all__ = ["CollectiveThread", "Work", "keep_works_of_reducers", "wait_until"]

T = TypeVar("T")
_SPINS = 100  # they take about as long as a message does if the other ranks are there already


def wait_until(test: Callable[[], object], seconds: float) -> bool:
    """Call ``test`` until it is true or ``seconds`` have passed; return whether it became true.

    The calls follow each other closely at first, then with pauses: MPI's own waiting keeps a core
    busy, which other threads of this process may need.
    """
    for _ in range(_SPINS):
        if test():
            return True
    start, pause = time.monotonic(), 2e-5
    while not test():
        if time.monotonic() - start > seconds:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)
    return True


_Task: TypeAlias = "tuple[Callable[[], None], Work]"  # a collective, and its Work to complete
_DONE = threading.Event()
_DONE.set()
_completion_lock = threading.Lock()  # so that each future is completed exactly once


class _Failed:
    """The value of a failed future.

    DistributedDataParallel looks for tensors in the value by pickling it, which raises the error.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise self.error


def _raise(failed: _Failed) -> NoReturn:
    raise failed.error


@no_compile_methods
class _Future(torch.futures.Future[object]):
    """A future that runs its callbacks on the thread that adds them, once it is complete.

    Hooks of DistributedDataParallel begin collectives in callbacks, and these must have the same
    order on every rank.
    """

    def fail(self, error: BaseException) -> None:
        self._set_unwrap_func(_raise)
        self.set_result(_Failed(error))

    def then(self, callback: Callable[[torch.futures.Future[object]], T]) -> torch.futures.Future[T]:
        self.wait()
        return super().then(callback)

    def add_done_callback(self, callback: Callable[[torch.futures.Future[object]], None]) -> None:
        self.wait()
        super().add_done_callback(callback)


@no_compile_methods
class Work(_Work):
    """A collective, or a message, that was begun: torch.distributed's handle to wait for it.

    Args:
        result: the tensors that hold the result, as torch nests them.
        call: what errors call it; only its text is used.
        done: the event that is set once it is done; None: a new one.
    """

    def __init__(self, result: object, call: object, done: threading.Event | None = None) -> None:
        super().__init__()
        self._result, self._call = result, call
        self._done = done or threading.Event()
        self._error: BaseException | None = None
        self._future: _Future | None = None
        self._source = -1

    @classmethod
    def completed(cls, result: object, call: object) -> Work:
        """Return a Work that is done already."""
        return cls(result, call, _DONE)

    def keep_for_cpp(self) -> Work:
        """Return this. With torch 2.6, keep it alive until a wait for it, or for its future.

        C++ code of torch 2.6 keeps only the C++ half of the object.
        """
        if not CPP_KEEPS_WORKS:
            _awaited_by_none.add(self)
        return self

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it is done, and return True.

        Raises the collective's own error, or CollectiveTimeoutError after ``timeout``; None or
        zero: never.
        """
        _awaited_by_none.discard(self)
        seconds = timeout.total_seconds() if timeout is not None else 0
        if not self._done.wait(seconds if seconds > 0 else None):
            raise CollectiveTimeoutError(f"{self._call} took longer than {seconds} s{on_rank()}")
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        self.wait()

    def complete(self, error: BaseException | None = None) -> None:
        """Mark it as done, or as failed with ``error``, and wake everyone who waits."""
        self._error = error
        with _completion_lock:
            self._done.set()
            future = self._future
        if future is not None:
            self._complete_future(future)

    def get_future(self) -> torch.futures.Future[object]:
        _awaited_by_none.discard(self)
        with _completion_lock:
            if self._future is not None:
                return self._future
            future = self._future = _Future()
            done = self._done.is_set()
        if done:
            self._complete_future(future)
        return future

    def _complete_future(self, future: _Future) -> None:
        """Complete the future. The lock must be free: waiting threads may go on at once."""
        if self._error is None:
            future.set_result(self._result)
        else:
            future.fail(self._error)

    def as_cpp_work(self) -> _Work:
        """Return a C++ Work that keeps this Python object alive. torch's C++ alone would not."""
        if not CPP_KEEPS_WORKS:
            return work_of_cpp(self.get_future())
        return dist.ProcessGroup.barrier(_ReturnsWork(self), dist.BarrierOptions())

    def boxed(self) -> torch.ScriptObject:
        return self.as_cpp_work().boxed()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def is_success(self) -> bool:
        return self._done.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> object:  # type: ignore[override]
        return self._result

    def _source_rank(self) -> int:
        return self._source

    source_rank = _source_rank


_awaited_by_none: set[Work] = set()  # filled only with torch 2.6


class _ReturnsWork(dist.ProcessGroup):
    """A process group whose barrier returns a given Work.

    torch keeps a Python Work alive only if a Python process group's method returned it to C++.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]
        self._work = work

    def barrier(self, _: object) -> Work:  # type: ignore[override]
        return self._work


class CollectiveThread:
    """A thread that runs one process group's collectives in order. It starts with the first one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[_Task | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._last = _DONE  # `done` of the last task, since its Work would keep the tensors

    def submit(self, run: Callable[[], None], work: Work) -> Work:
        """Call ``run`` on the thread, after all earlier ones, then complete ``work``. Return it."""
        if self._process != os.getpid():
            raise MPISyncBNError(
                "a forked process cannot use the process groups of the one it comes from: leave the "
                "collectives to that one"
            )
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
            atexit.register(self._at_exit)  # before MPI ends
        self._last = work._done
        self._tasks.put((run, work))
        return work

    def is_current_thread(self) -> bool:
        """Whether the caller is this thread, which cannot wait for itself."""
        return threading.current_thread() is self._thread

    def drain(self) -> None:
        """Wait for all collectives that were submitted so far."""
        if self._process == os.getpid():
            self._last.wait()

    def _at_exit(self) -> None:
        # If a rank fails, the others do not come. A forked child has no such thread.
        if exits.status() == 0 and self._process == os.getpid():
            # Wait for the completion of futures too: Python ends its threads at exit, and a thread
            # that is in C++ code of torch then would end the process with SIGABRT.
            thread, idle = self._thread, threading.Event()
            self._tasks.put(idle)
            while thread is not None and thread.is_alive() and not idle.wait(0.1):
                pass

    def close(self) -> None:
        """Wait for all collectives, and end the thread."""
        self.drain()
        if self._thread is not None:
            atexit.unregister(self._at_exit)
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            if isinstance(task, threading.Event):
                task.set()
                continue
            run, work = task
            error = None
            try:
                run()
            except BaseException as problem:  # raised by work.wait()
                error = problem
            work.complete(error)
            del task, run, work  # they hold tensors


def keep_works_of_reducers() -> None:
    """Keep alive the Work that DistributedDataParallel.join() hands to its reducer, and then drops.

    The reducer is in C++, which alone would keep only the C++ half of the Work.
    """
    hand_over = dist.Reducer._set_forward_pass_work_handle

    def hand_over_kept(reducer: dist.Reducer, work: _Work, use_static_world_size: bool) -> None:
        hand_over(reducer, work.as_cpp_work() if isinstance(work, Work) else work, use_static_world_size)

    dist.Reducer._set_forward_pass_work_handle = hand_over_kept  # type: ignore[method-assign, assignment]
