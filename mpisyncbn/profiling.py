"""Records of collectives and exchanges, by name, for torch.profiler.

Without a profiler, a record costs a look at a flag.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

__all__ = ["begin", "find_torch", "in_background", "locked", "profiler", "record"]


class _NoTorch:
    _is_profiler_enabled = False


profiler: Any = _NoTorch  # torch.autograd.profiler: callers look at its flag


def find_torch() -> None:
    """Use torch's profiler from here on, if torch has been imported."""
    global profiler
    if "torch.autograd.profiler" in sys.modules:
        profiler = sys.modules["torch.autograd.profiler"]


def record(name: str) -> AbstractContextManager[object]:
    """A context manager of torch. The code inside appears in the profile as ``name``."""
    return profiler.record_function(name)


def locked(name: str, lock: AbstractContextManager[object]) -> AbstractContextManager[object]:
    """A context that holds ``lock``. A running profiler of torch records it as ``name``."""
    return _recorded(name, lock) if profiler._is_profiler_enabled else lock


@contextmanager
def _recorded(name: str, lock: AbstractContextManager[object]) -> Iterator[None]:
    """A context that holds ``lock``. Its record, ``name``, includes the wait for the lock."""
    with record(name), lock:
        yield


def begin(name: str) -> Callable[[], None]:
    """Begin a record. Returns a function that ends it, on any thread.

    A profiler must be enabled.
    """
    recording, ended = profiler.record_function(name), sys.modules["torch"].futures.Future()
    recording.__enter__()
    recording._call_end_callbacks_on_future(ended)  # the future knows the profiler of this thread
    return lambda: ended.set_result(None)


def in_background(name: str, run: Callable[[], None]) -> Callable[[], None]:
    """A function for another thread, which calls ``run`` and ends a record that begins now.

    A profiler must be enabled.
    """
    end = begin(name)

    def run_and_end() -> None:
        try:
            run()
        finally:
            end()

    return run_and_end
