"""torch.profiler shows collectives, messages and exchanges by name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

import mpisyncbn
import mpisyncbn.distributed
from mpisyncbn import CollectiveMismatchError, functional, profiling
from support.ranks import WORLD, no_exchange, several, together
from support.versions import compiles

RANK, SIZE = WORLD.rank, WORLD.size
pytestmark = [
    pytest.mark.usefixtures("world"),
    # Torch 2.13 renames collectives, and its compiler warns about itself.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def profiler() -> Any:
    return profile(activities=[ProfilerActivity.CPU])


def shown(recorded: Any) -> Counter[str]:
    """Return how often each name was recorded that begins with ``mpi4py:`` or ``mpisyncbn:``.

    Custom operations, whose names begin with ``mpisyncbn::``, are left out.
    """
    names = [event.name for event in recorded.events()]
    return Counter(name for name in names if name.startswith(("mpi4py:", "mpisyncbn:")) and "::" not in name)


def test_collectives() -> None:
    """Collectives have names like those of gloo, such as "gloo:all_reduce".

    Synchronous ones are recorded, and asynchronous ones, which run on the group's own thread.
    """
    x, parts = torch.ones(2), [torch.ones(2) for _ in range(SIZE)]
    with profiler() as recorded:
        dist.all_reduce(x)
        work = dist.all_reduce(x, async_op=True)
        dist.broadcast(x, 0)
        dist.reduce(x, 0)
        dist.all_gather(parts, x)
        dist.all_gather_into_tensor(torch.ones(2 * SIZE), x)
        dist.gather(x, parts if RANK == 0 else None)
        dist.scatter(x, parts if RANK == 0 else None)
        dist.reduce_scatter(x, parts)
        dist.reduce_scatter_tensor(x, torch.ones(2 * SIZE))
        dist.all_to_all(parts, [part.clone() for part in parts])
        dist.all_to_all_single(torch.ones(SIZE), torch.ones(SIZE))
        dist.barrier()
        mpisyncbn.distributed.monitored_barrier()
        work.wait()
    with together():
        once = "broadcast reduce all_gather all_gather_into_tensor gather scatter reduce_scatter barrier"
        once += " reduce_scatter_tensor all_to_all all_to_all_single monitored_barrier"
        assert shown(recorded) == {"mpi4py:all_reduce": 2} | {f"mpi4py:{name}": 1 for name in once.split()}


def test_the_time_of_asynchronous_ones() -> None:
    """The recorded time lasts from the call until the group's thread has finished."""
    x = torch.ones(500_000)
    with profiler() as recorded:
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        dist.barrier(async_op=True).wait()
    (event,) = [event for event in recorded.events() if event.name == "mpi4py:all_reduce"]
    with together():
        assert event.is_async
        assert 0 < event.time_range.elapsed_us() < 60e6


@several
def test_messages() -> None:
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    out = torch.zeros(2)
    with profiler() as recorded:
        works = [dist.isend(torch.ones(2), after), dist.irecv(out, before)]
        for work in works:
            work.wait()
    with together():
        assert shown(recorded) == {"mpi4py:send": 1, "mpi4py:recv": 1}


@compiles
def test_layers() -> None:
    """A layer, eager or compiled, records one exchange in each direction.

    A compiled graph makes its exchanges inside of custom operations.
    """
    layer = mpisyncbn.SyncBatchNorm(3)
    x = torch.randn(RANK + 2, 3, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x).sum().backward()
    found = []
    for net in (layer, compiled):
        with profiler() as recorded:
            net(x).sum().backward()
        found.append(shown(recorded))
    with profiler() as recorded:
        y, stats = functional.batch_norm_forward(x.detach())
        functional.batch_norm_backward(y, x.detach(), stats)
        functional.batch_norm_forward(np.ones((2, 3)))
    once = {"mpisyncbn:merge_moments": 1, "mpisyncbn:reduce_sums": 1}
    with together():
        assert found == [once, once]
        assert shown(recorded) == {"mpisyncbn:merge_moments": 2, "mpisyncbn:reduce_sums": 1}


def test_training() -> None:
    """Buckets of DistributedDataParallel are reduced on the group's thread, during backward."""
    net = mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    ddp = nn.parallel.DistributedDataParallel(net)
    ddp(torch.randn(RANK + 2, 3)).sum().backward()
    with profiler() as recorded:
        ddp(torch.randn(RANK + 2, 3)).sum().backward()
    with together():
        names = shown(recorded)
        assert names["mpi4py:all_reduce"] >= 1
        assert names["mpisyncbn:merge_moments"] == names["mpisyncbn:reduce_sums"] == 1


def average(x: torch.Tensor, background: bool) -> None:
    work = dist.all_reduce(x, dist.ReduceOp.AVG, async_op=background)
    if background:
        work.wait()


def test_a_failed_collective_is_recorded() -> None:
    """A collective that fails is recorded. Its record is closed before later operations."""
    with profiler() as recorded:
        for background in (False, True):
            with pytest.raises(TypeError, match="not defined"):
                average(torch.ones(2, dtype=torch.bool), background)
        if SIZE > 1:
            with pytest.raises(CollectiveMismatchError):
                dist.all_reduce(torch.ones(2 + RANK))
        torch.ones(2).mul(2)
    (after,) = [event for event in recorded.events() if event.name == "aten::mul"]
    with together():
        assert shown(recorded) == {"mpi4py:all_reduce": 2 + (SIZE > 1)}
        assert after.cpu_parent is None


@no_exchange
def test_without_a_profiler_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "record", lambda name: pytest.fail(name))
    dist.all_reduce(torch.ones(2))
    dist.all_reduce(torch.ones(2), async_op=True).wait()
    mpisyncbn.SyncBatchNorm(3)(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert profiling.profiler is torch.autograd.profiler
