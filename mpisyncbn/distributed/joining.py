"""Ranks with fewer batches than others: DistributedDataParallel.join() with synchronized layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.parallel import DistributedDataParallel

from .. import uneven
from ..errors import on_rank

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
        model: a DistributedDataParallel.
        divide_by_initial_world_size, enable, throw_on_early_termination: as its method ``join``
            takes them.

    Raises:
        TypeError: ``model`` is not a DistributedDataParallel.
        MPISyncBNError: MPI is without MPI_THREAD_MULTIPLE.

    Collective: every rank of the model's group must enter, and leave.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"expected a DistributedDataParallel, got {type(model).__name__}{on_rank()}")
    groups = []
    if enable:
        uneven.check_threads("join")
        groups = uneven.groups_of(model)
    # With early termination all ranks stop at the same time, and no rank is left to serve.
    threads = [] if throw_on_early_termination else [uneven.ServingThread(group) for group in groups]
    with (
        uneven.joining(groups),
        model.join(divide_by_initial_world_size, enable, throw_on_early_termination),
    ):
        yield
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.finish()
