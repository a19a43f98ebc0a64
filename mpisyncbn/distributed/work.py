"""Collectives in the background: a thread per process group, and what its callers wait on."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Work as _Work

from ..errors import CollectiveTimeoutError, MPISyncBNError, on_rank
from ..liveness import exits
from .no_compile import no_compile_methods

__all__ = ["CollectiveThread", "Work", "keep_works_of_reducers", "wait_until"]

_SPINS = 100  # about as long as a message takes where the others are there already


def wait_until(test: Callable[[], Any], seconds: float) -> bool:
    """Call ``test`` until it is true or ``seconds`` have passed: often at first, then with pauses.

    MPI's own waiting keeps a core busy, which the others of this process may need.
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


_DONE = threading.Event()
_DONE.set()
_completion_lock = threading.Lock()  # between whoever completes a Work and whoever asks for its future


class _Failed:
    """What a failed future holds. DistributedDataParallel looks for tensors in it, and meets the error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce_ex__(self, _: Any) -> Any:
        raise self.error


def _raise(failed: _Failed) -> None:
    raise failed.error


@no_compile_methods
class _Future(torch.futures.Future):
    """What comes after it comes on the thread that says so, and not whenever it is done.

    Hooks of DistributedDataParallel begin collectives there, which must have the same order on every rank.
    """

    def fail(self, error: BaseException) -> None:
        self._set_unwrap_func(_raise)
        self.set_result(_Failed(error))

    def then(self, callback: Any) -> Any:
        self.wait()
        return super().then(callback)

    def add_done_callback(self, callback: Any) -> None:
        self.wait()
        super().add_done_callback(callback)


@no_compile_methods
class Work(_Work):
    """A collective that was begun, as torch.distributed knows it."""

    def __init__(self, result: Any, what: Any, over: threading.Event | None = None) -> None:
        super().__init__()
        self._result, self._what = result, what
        self._done = over or threading.Event()
        self._error: BaseException | None = None
        self._future: Any = None
        self._source = -1

    @classmethod
    def done(cls, result: Any, what: Any) -> Work:
        """One that is over already."""
        return cls(result, what, _DONE)

    def wait(self, timeout: Any = None) -> bool:
        """Until it is done. Raises what went wrong, or CollectiveTimeoutError after ``timeout``."""
        seconds = timeout.total_seconds() if timeout is not None else 0
        if not self._done.wait(seconds if seconds > 0 else None):
            raise CollectiveTimeoutError(f"{self._what} took longer than {seconds} s{on_rank()}")
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        self.wait()

    def complete(self, error: BaseException | None = None) -> None:
        self._error = error
        with _completion_lock:
            self._done.set()
            future = self._future
        if future is not None:
            self._complete_future(future)

    def get_future(self) -> Any:
        with _completion_lock:
            if self._future is not None:
                return self._future
            future = self._future = _Future()
            over = self._done.is_set()
        if over:
            self._complete_future(future)
        return future

    def _complete_future(self, future: Any) -> None:
        # outside the lock: whoever waits for it may go on at once
        if self._error is None:
            future.set_result(self._result)
        else:
            future.fail(self._error)

    def as_cpp_work(self) -> _Work:
        """As a Work of C++ that keeps this alive, which C++ alone does not do with an object of Python."""
        return dist.ProcessGroup.barrier(_Returning(self), dist.BarrierOptions())

    def boxed(self) -> Any:
        return self.as_cpp_work().boxed()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def is_success(self) -> bool:
        return self._done.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> Any:
        return self._result

    def _source_rank(self) -> int:
        return self._source

    source_rank = _source_rank


class _Returning(dist.ProcessGroup):
    """A group for torch's own remedy: what a method of a group in Python returns to C++ is kept there."""

    def __init__(self, work: Work) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]
        self._work = work

    def barrier(self, _: Any) -> Work:  # type: ignore[override]
        return self._work


class CollectiveThread:
    """Runs what it is given in order, on a thread of its own, which starts with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], Work] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._last = _DONE  # what was given last is over: not the Work, nor the tensors that it holds

    def submit(self, run: Callable[[], None], work: Work) -> Work:
        if self._process != os.getpid():
            raise MPISyncBNError("a forked process cannot use the process groups of the one it comes from")
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
            atexit.register(self._at_exit)  # before MPI ends
        self._last = work._done
        self._tasks.put((run, work))
        return work

    def is_current_thread(self) -> bool:
        """Whether this is the thread: it cannot wait for itself."""
        return threading.current_thread() is self._thread

    def drain(self) -> None:
        """Wait for everything that was given so far."""
        if self._process == os.getpid():
            self._last.wait()

    def _at_exit(self) -> None:
        if exits.status() == 0:  # else the job ends, and nobody comes
            self.drain()

    def close(self) -> None:
        self.drain()
        if self._thread is not None:
            atexit.unregister(self._at_exit)
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            run, work = task
            error = None
            try:
                run()
            except BaseException as problem:  # whoever waits for it raises it
                error = problem
            work.complete(error)
            del task, run, work  # and the tensors they hold


def keep_works_of_reducers() -> None:
    """DistributedDataParallel.join() hands a Work to its reducer, in C++, and drops it."""
    hand_over = dist.Reducer._set_forward_pass_work_handle

    def keeping(reducer: Any, work: Any, use_static_world_size: bool) -> None:
        hand_over(reducer, work.as_cpp_work() if isinstance(work, Work) else work, use_static_world_size)

    dist.Reducer._set_forward_pass_work_handle = keeping  # type: ignore[method-assign, assignment]
