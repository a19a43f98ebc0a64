"""Ranks with fewer batches than others: DistributedDataParallel.join() with synchronized layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.parallel import DistributedDataParallel

from .. import exchange
from ..comm.communicator import Communicator, mpi, resolve
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

    A rank that has left the body goes on answering the others' synchronized layers, with a count of zero,
    until all have left it. To know what to answer, the ranks send one message more for each exchange.

    Args:
        model: the arguments after it are those of its ``join``.

    Raises:
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
    layers = [layer for layer in model.modules() if enable and isinstance(layer, Synchronized)]
    groups = list(dict.fromkeys(resolve(layer.communicator) for layer in layers))
    # Where the first to be through ends it for all, nobody is left to answer.
    answers = [] if throw_on_early_termination else [_ServingThread(group) for group in groups]
    try:
        with model.join(divide_by_initial_world_size, enable, throw_on_early_termination):
            for group in groups:
                group.ready().joining = True
            yield
            for each in answers:
                each.start()
    finally:
        for group in groups:
            group.joining = False
    for each in answers:
        each.join()
        if each.error is not None:
            raise each.error


class _ServingThread(threading.Thread):
    """Answers one group beside what DistributedDataParallel does for the gradients."""

    def __init__(self, group: Communicator) -> None:
        super().__init__(name="mpisyncbn join", daemon=True)
        self._group = group
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            exchange.answer(self._group)
        except Exception as error:
            self.error = error
