"""Ranks with fewer batches than others: DistributedDataParallel.join() with synchronized layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.parallel import DistributedDataParallel

from .. import exchange
from ..comm.communicator import Communicator
from ..comm.groups import resolve
from ..comm.runtime import mpi
from ..convert import Synchronized
from ..errors import MPISyncBNError, on_rank

__all__ = ["join"]


@contextmanager
def join(
    model: DistributedDataParallel,
    divide_by_initial_world_size: bool = True,
    enable: bool = True,
    throw_on_early_termination: bool = False,
) -> Iterator[None]:
    """``model.join()`` of DistributedDataParallel, for models with synchronized batch norm.

    A rank that has left the body goes on answering the others' synchronized layers, with a count
    of zero, until all ranks have left it. To know what to answer, the ranks send one message more
    for each exchange.

    Args:
        model: the other arguments are those of its method ``join``.

    Raises:
        TypeError: ``model`` is not a DistributedDataParallel.
        MPISyncBNError: MPI is without MPI_THREAD_MULTIPLE.

    Collective: every rank of the model's group must enter, and leave.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"expected a DistributedDataParallel, got {type(model).__name__}{on_rank()}")
    MPI = mpi()
    if enable and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise MPISyncBNError(
            f"join() needs MPI_THREAD_MULTIPLE, MPI provides level {MPI.Query_thread()}{on_rank()}: set "
            "mpi4py.rc.thread_level to 'multiple', its default"
        )
    groups = _groups_of(model) if enable else []
    # With early termination all ranks stop at the same time, and no rank is left to serve.
    threads = [] if throw_on_early_termination else [_ServingThread(group) for group in groups]
    try:
        with model.join(divide_by_initial_world_size, enable, throw_on_early_termination):
            for group in groups:
                group.ready().in_join_context = True
            yield
            for thread in threads:
                thread.start()
    finally:
        for group in groups:
            group.in_join_context = False
    for thread in threads:
        thread.finish()


def _groups_of(model: DistributedDataParallel) -> list[Communicator]:
    """Return the groups of the model's synchronized layers, each once, in the order of layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, Synchronized)]
    return list(dict.fromkeys(resolve(layer.communicator) for layer in layers))


class _ServingThread(threading.Thread):
    """Serves one group's exchanges, while DistributedDataParallel does the same for gradients."""

    def __init__(self, group: Communicator) -> None:
        super().__init__(name="mpisyncbn join", daemon=True)
        self._group = group
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            exchange.serve_joined(self._group)
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the thread, and raise its error if there was one."""
        self.join()
        if self._error is not None:
            raise self._error
