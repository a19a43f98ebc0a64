"""Asynchronous collectives, and messages from rank to rank."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

import mpisyncbn
from mpisyncbn import CollectiveTimeoutError, MPISyncBNError
from mpisyncbn.distributed.work import Work
from support.ranks import WORLD, error_of, several, together
from support.versions import newer_than_2_6

RANK, SIZE = WORLD.rank, WORLD.size
pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch 2.13 renames collectives
]


def test_many_at_once() -> None:
    tensors = [torch.full((1 + 100 * i,), float(RANK + i)) for i in range(30)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    last = torch.ones(1)
    dist.all_reduce(last)  # runs after all the others
    done = [work.is_completed() for work in works]
    futures = [work.get_future() for work in works]
    for work in works:
        work.wait()

    with together():
        for i, tensor in enumerate(tensors):
            assert (tensor == sum(range(SIZE)) + i * SIZE).all()
        assert all(done)
        assert last == SIZE
        assert all(work.is_success() for work in works)
        assert torch.equal(futures[3].wait()[0], tensors[3])


class OnGPU(Tensor):
    is_cuda = True


def scatter(parts: list[Tensor], _: Tensor) -> Any:
    last = SIZE - 1
    return dist.scatter(parts[-1], [torch.ones(2)] * SIZE if last == RANK else None, last, async_op=True)


def receive(parts: list[Tensor], _: Tensor) -> Any:
    dist.isend(torch.ones(2), RANK)
    return dist.irecv(parts[-1], RANK)


@several
@pytest.mark.parametrize(
    "begin",
    [
        lambda parts, own: dist.all_gather(parts, own, async_op=True),
        lambda parts, own: dist.all_to_all(parts, [own] * SIZE, async_op=True),
        scatter,
        receive,
    ],
)
def test_results_on_a_gpu_wait_for_its_stream(begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's stream may still write a tensor that another thread writes next.

    Rank 0 has no data of its own, whose copy to the host would wait for the stream.
    """
    parts = [torch.zeros(2 * min(rank, 1)).as_subclass(OnGPU) for rank in range(SIZE)]
    seen: list[list[float]] = []
    stream = SimpleNamespace(synchronize=lambda: seen.append(parts[-1].tolist()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    work = begin(parts, torch.ones(2 * min(RANK, 1)))
    before = seen[:1]
    work.wait()
    with together():
        assert before == [[0.0, 0.0]]
        assert parts[-1].tolist() == [1.0, 1.0]


def test_beside_synchronized_layers() -> None:
    """Messages of asynchronous reductions and of layers at the same time do not mix."""
    layer = mpisyncbn.SyncBatchNorm(4).double()
    x = torch.randn(RANK + 2, 4, 5, dtype=torch.float64, requires_grad=True)
    sums = []
    for i in range(10):
        tensor = torch.full((50_000,), float(i))
        work = dist.all_reduce(tensor, async_op=True)
        layer(x).pow(2).sum().backward()
        work.wait()
        sums.append(tensor)

    with together():
        assert all((tensor == i * SIZE).all() for i, tensor in enumerate(sums))


def test_one_after_the_other() -> None:
    """Asynchronous reductions of one tensor run in order, also if the tensor is not contiguous."""
    for tensor in (torch.ones(3), torch.ones(3, 2)[:, 0]):
        works = [dist.all_reduce(tensor, async_op=True) for _ in range(3)]
        for work in works:
            work.wait()
        with together():
            assert (tensor == SIZE**3).all()


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        half, mean = torch.ones(3).bfloat16(), torch.ones(4, 2)[:, 0]
        works = [
            dist.all_reduce(half, async_op=True),
            dist.all_reduce(mean, ReduceOp.AVG, async_op=True),
        ]
        for work in works:
            work.wait()
    with together():
        assert (half == SIZE).all()
        assert (mean == 1).all()


@several
def test_messages_beside_a_collective_that_waits() -> None:
    """Rank 0's reduction waits for rank 1, which waits for rank 0's message first."""
    tensor, note = torch.ones(2), torch.zeros(1)
    if RANK == 0:
        work = dist.all_reduce(tensor, async_op=True)
        dist.isend(torch.ones(1), 1).wait()
        work.wait()
    else:
        if RANK == 1:
            dist.recv(note, 0)
        dist.all_reduce(tensor)
    with together():
        assert (tensor == SIZE).all()
        assert RANK != 1 or note == 1


@several
def test_a_receive_that_is_given_up() -> None:
    late, next_one, error = torch.zeros(2), torch.zeros(2), None
    if RANK == 0:
        error = error_of(lambda: dist.irecv(late, 1).wait(timedelta(seconds=0.2)), CollectiveTimeoutError)
    dist.barrier()
    if RANK == 1:
        dist.send(torch.ones(2), 0)
    elif RANK == 0:
        dist.recv(next_one, 1)
    with together():
        if RANK == 0:
            assert "nothing for 0.2 s" in str(error)
            assert (late == 0).all()
            assert (next_one == 1).all(), "the message went to a receive that nobody waits for"


def test_wait_raises_the_error() -> None:
    work = dist.all_reduce(torch.zeros(3, dtype=torch.bool), ReduceOp.AVG, async_op=True)
    with pytest.raises(TypeError, match=r"AVG of torch\.bool is not defined"):
        work.wait()
    with together():
        assert isinstance(work.exception(), TypeError)
        assert work.is_completed()
        assert not work.is_success()


@several
def test_around_a_ring(limit: None) -> None:
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    out = [torch.zeros(40), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2).t()]
    works = [dist.irecv(tensor, before, tag=tag) for tag, tensor in enumerate(out)]
    for tag in (2, 0, 1):  # messages match by tag, not by order
        works.append(
            dist.isend(torch.full(out[tag].shape, 10 * RANK + tag, dtype=out[tag].dtype), after, tag=tag)
        )
    for work in works:
        work.wait()
    batch = torch.zeros(5)
    sends = [
        dist.P2POp(dist.isend, torch.full((5,), float(RANK)), after),
        dist.P2POp(dist.irecv, batch, before),
    ]
    for work in dist.batch_isend_irecv(sends):
        work.wait()

    with together():
        for tag, tensor in enumerate(out):
            assert (tensor == 10 * before + tag).all()
        assert (batch == before).all()


@several
def test_from_anyone() -> None:
    seen = []
    if RANK == 0:
        for _ in range(SIZE - 1):
            tensor = torch.zeros(2)
            seen.append((dist.recv(tensor), tensor[0].item()))
    else:
        dist.send(torch.full((2,), float(RANK)), 0)
    wrong: Any = None
    long: Any = None
    if RANK == 0:
        wrong = error_of(lambda: dist.recv(torch.zeros(4), 1, tag=1), ValueError)
        long = error_of(lambda: dist.recv(torch.zeros(2), 1, tag=2), MPISyncBNError)
    elif RANK == 1:
        dist.send(torch.zeros(3), 0, tag=1)
        dist.send(torch.zeros(3), 0, tag=2)

    with together():
        if RANK == 0:
            assert sorted(seen) == [(rank, rank) for rank in range(1, SIZE)]
            assert "expected 16 bytes, 12 came" in str(wrong)
            assert "the message is longer than the tensor. Receive as many bytes" in str(long)


def test_a_collective_that_was_begun():
    work = Work("the result", "all_reduce of something")
    with pytest.raises(CollectiveTimeoutError, match="all_reduce of something took longer than"):
        work.wait(timedelta(seconds=0.01))
    future, seen = work.get_future(), []
    assert work.get_future() is future
    assert not work.is_success()
    work.complete()
    work.synchronize()
    future.add_done_callback(lambda done: seen.append(done.value()))
    assert [*seen, work.result()] == ["the result"] * 2
    failed = Work(None, "all_reduce of something")
    future = failed.get_future()
    failed.complete(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        future.wait()
    assert not failed.is_success()


def registered(x: Tensor, work: Any) -> Any:
    torch._C._distributed_c10d._register_work(x, work)
    return lambda: torch.ops._c10d_functional.wait_tensor(x)


def boxed(_: Tensor, work: Any) -> Any:
    box = work.boxed()
    return lambda: (dist.Work.unbox(box).wait(), dist.Work.unbox(box).get_future().wait())


def future(_: Tensor, work: Any) -> Any:
    return work.get_future().wait


@pytest.mark.parametrize(
    "keep",
    [pytest.param(registered, marks=newer_than_2_6("never lets go of what is registered")), boxed, future],
)
def test_works_that_only_cpp_code_keeps(keep: Any) -> None:
    """torch's C++ code can wait for a Work that Python has dropped. Nothing keeps it later."""
    x = torch.ones(2)
    work = dist.all_reduce(x, async_op=True)
    seen, wait = weakref.ref(work), keep(x, work)
    del work
    wait()
    del wait
    dist.barrier(async_op=True).wait()  # the group's thread lets go of the Work before it begins this
    gc.collect()
    with together():
        assert (x == SIZE).all()
        assert seen() is None


@several
def test_messages_that_have_come_are_let_go() -> None:
    x = torch.full((2,), float(RANK))
    out = torch.zeros(2)
    sent, received = dist.isend(x, (RANK + 1) % SIZE), dist.irecv(out, (RANK - 1) % SIZE)
    seen = [weakref.ref(sent), weakref.ref(received)]
    sent.wait()
    received.wait()
    del sent, received
    with together():
        assert (out == (RANK - 1) % SIZE).all()
        assert [ref() for ref in seen] == [None, None]
