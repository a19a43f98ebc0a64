"""Ranks without data answer the exchanges of the others, with a count of 0."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from . import exchange
from .comm.communicator import Communicator
from .comm.groups import resolve
from .comm.runtime import mpi
from .convert import synchronized_layers
from .errors import MPISyncBNError, on_rank

__all__ = ["ServingThread", "announcing", "check_threads", "groups_of", "serve"]


def groups_of(model: nn.Module) -> list[Communicator]:
    """The groups of a model's synchronized layers, each once, in the order of layers."""
    return list(dict.fromkeys(resolve(layer.communicator) for layer in synchronized_layers(model)))


def check_threads(function: str) -> None:
    """Raise MPISyncBNError, which names ``function``, if MPI does not allow several threads."""
    MPI = mpi()
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise MPISyncBNError(
            f"{function}() needs MPI_THREAD_MULTIPLE, MPI provides level {MPI.Query_thread()}{on_rank()}: "
            "set mpi4py.rc.thread_level to 'multiple', its default"
        )


@contextmanager
def announcing(groups: Sequence[Communicator]) -> Iterator[None]:
    """A context in which each exchange announces itself to ranks that have run out of data.

    A captured graph cannot announce its exchanges, so a replay inside is an error.
    """
    try:
        for group in groups:
            group.ready().synchronize()  # of replays, those from before are no error
            _set_in_join(group, True)
        yield
    finally:
        for group in groups:
            _set_in_join(group, False)


def _set_in_join(group: Communicator, in_join: bool) -> None:
    group.in_join_context = in_join
    if group.stream is not None:
        group.stream.in_join = in_join


class _Refusal(AbstractContextManager[None]):
    """In place of the lock of a group: every call on the group raises an error."""

    def __enter__(self) -> None:
        raise MPISyncBNError(
            f"this group cannot be used since join failed{on_rank()}: ranks without data may still wait in "
            "it. Make a new communicator, such as MPI.COMM_WORLD.Dup(), and pass it to the model with "
            "mpisyncbn.set_process_group()"
        )

    def __exit__(self, *_: object) -> None: ...


class ServingThread(threading.Thread):
    """Serves one group's exchanges, while this rank does other things for the same ranks."""

    def __init__(self, group: Communicator) -> None:
        super().__init__(name="mpisyncbn join", daemon=True)
        self.group = group
        self.answered = 0  # exchanges with data
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self.answered = exchange.serve_joined(self.group)
        except Exception as error:
            self._error = error

    def give_up(self) -> None:
        """Refuse later calls on the group, if the thread was started: nothing ends its wait.

        It holds the lock of the group, and would take part in the next exchange of the other ranks.
        """
        if self.ident is not None:
            self.group.lock, self.group.rank_status.given_up = _Refusal(), True

    def finish(self) -> None:
        """Wait for the thread, and raise its error if there was one."""
        self.join()
        if self._error is not None:
            raise self._error


def serve(groups: Sequence[Communicator]) -> None:
    """Serve the exchanges of several groups until all ranks do so. Collective over each group."""
    threads = [ServingThread(group) for group in groups[1:]]
    for thread in threads:
        thread.start()
    for group in groups[:1]:
        exchange.serve_joined(group)
    for thread in threads:
        thread.finish()
