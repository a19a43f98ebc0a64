"""Ranks with fewer batches than others: DistributedDataParallel.join() with synchronized layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .. import uneven
from ..comm.groups import resolve
from ..convert import synchronized_layers
from ..errors import on_rank
from .host_tensors import copy_back, to_cpu

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
    for each exchange. At the end all ranks get the layers' running statistics, from the last one.

    Args:
        model: a DistributedDataParallel.
        divide_by_initial_world_size, enable, throw_on_early_termination: as its method ``join``
            takes them.

    Raises:
        TypeError: ``model`` is not a DistributedDataParallel.
        MPISyncBNError: MPI is without MPI_THREAD_MULTIPLE. After an error that leaves the context,
            later calls on the layers' groups raise it too, on the ranks that had left the body.

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
    try:
        with (
            uneven.announcing(groups),
            model.join(divide_by_initial_world_size, enable, throw_on_early_termination),
        ):
            yield
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.finish()
    except BaseException:
        for thread in threads:
            thread.give_up()
        raise
    for thread in threads:
        _share_statistics(model, thread)


def _share_statistics(model: nn.Module, thread: uneven.ServingThread) -> None:
    """Copy the running statistics of one group's layers from a rank that was the last to finish.

    DistributedDataParallel does so for the last rank of the model, if it broadcasts buffers at all.
    A layer that is in evaluation mode there keeps its own. Collective: every rank of the group must
    call.
    """
    group = thread.group
    layers = [layer for layer in synchronized_layers(model) if resolve(layer.communicator) is group]
    trained = [_statistics(layer) if layer.training else [] for layer in layers]
    # clones, because a pickled view brings all of its storage
    mine = [[to_cpu(buffer).clone() for buffer in buffers] for buffers in trained]
    with group.collective("sharing running statistics after join"):
        last = group.comm.allreduce(-1 if thread.answered else group.rank, op=group.max_op)
        found = group.comm.bcast(mine, root=last)
    for layer, values in zip(layers, found, strict=True):
        for buffer, value in zip(_statistics(layer), values, strict=False):
            copy_back(value, buffer)


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    buffers = layer.running_mean, layer.running_var, layer.num_batches_tracked
    return [buffer for buffer in buffers if buffer is not None]
