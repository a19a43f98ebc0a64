"""torch.distributed over MPI, beside gloo in the same job and beside oracles on the gathered inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ReduceOp, checkpoint
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mpisyncbn
from mpisyncbn import CollectiveMismatchError, CollectiveTimeoutError, MPISyncBNError, buffers, distributed
from support.ranks import WORLD, no_exchange, together

RANK, SIZE = WORLD.rank, WORLD.size
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch 2.13 renames collectives
several = pytest.mark.skipif(SIZE < 2, reason="needs two ranks to disagree")

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
DTYPES = [*FLOATS, *COMPLEX, *INTEGERS, torch.bool]
OPERATIONS = {
    "SUM": lambda all: all.sum(0),
    "AVG": lambda all: average(all),
    "PRODUCT": lambda all: all.prod(0),
    "MIN": lambda all: all.amin(0),
    "MAX": lambda all: all.amax(0),
    "BAND": lambda all: bits(all, torch.bitwise_and),
    "BOR": lambda all: bits(all, torch.bitwise_or),
    "BXOR": lambda all: bits(all, torch.bitwise_xor),
}


def average(all: Tensor) -> Tensor:
    if all.dtype.is_floating_point or all.dtype.is_complex:
        return all.mean(0)
    return all.sum(0).to(all.dtype).long().div(len(all), rounding_mode="trunc")


def bits(all: Tensor, operation: Any) -> Tensor:
    total = all[0]
    for each in all[1:]:
        total = operation(total, each)
    return total


def defined(name: str, dtype: torch.dtype) -> bool:
    inexact = dtype.is_floating_point or dtype.is_complex
    return not (
        (name == "AVG" and dtype is torch.bool)
        or (name in ("BAND", "BOR", "BXOR") and inexact)
        or (name in ("MIN", "MAX") and dtype.is_complex)
    )


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    mpisyncbn.init_process_group(timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gloo(world: None) -> Any:
    return dist.new_group(backend="gloo")


@pytest.fixture(params=["whole", "in pieces"])
def limit(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than MPI can count goes in pieces: here what is longer than 24 values."""
    if request.param == "in pieces":
        monkeypatch.setattr(buffers, "LIMIT", 24)
        monkeypatch.setattr(buffers, "_WIDE_PIECE", 5)


def values(dtype: torch.dtype, *shape: int, rank: int = RANK, seed: int = 0) -> Tensor:
    """Small whole numbers, whose sums and products are exact in every dtype."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    numbers = torch.randint(0, 4, shape, generator=generator)
    if dtype.is_complex:
        return torch.complex(numbers.double(), numbers.flip(0).double()).to(dtype)
    return numbers.to(dtype) if dtype is not torch.bool else numbers > 1


def everyone(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.stack([values(dtype, *shape, rank=rank, seed=seed) for rank in range(SIZE)])


def reduced(name: str, all: Tensor) -> Tensor:
    if all.dtype is torch.bool:
        return OPERATIONS[name](all.int()).bool()
    wide = all.double() if all.dtype in (torch.float16, torch.bfloat16) else all
    return OPERATIONS[name](wide).to(all.dtype)


def names_of(dtypes: list[torch.dtype]) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


# Every collective and dtype, beside gloo.


@pytest.mark.parametrize("dtype", DTYPES, ids=names_of(DTYPES))
@pytest.mark.parametrize("name", OPERATIONS)
def test_all_reduce(name: str, dtype: torch.dtype, gloo: Any, limit: None) -> None:
    operation = getattr(ReduceOp, name)
    if dtype.is_complex and name not in ("SUM", "AVG"):  # torch itself refuses
        with pytest.raises(ValueError, match="complex"):
            dist.all_reduce(values(dtype, 7, 5), operation)
        return
    if not defined(name, dtype):
        with pytest.raises(TypeError, match="not defined"):
            dist.all_reduce(values(dtype, 7, 5), operation)
        return
    ours, theirs = values(dtype, 7, 5), values(dtype, 7, 5)
    dist.all_reduce(ours, operation)
    try:
        dist.all_reduce(theirs, operation, group=gloo)
    except (RuntimeError, ValueError):
        theirs = ours  # not everything that is defined exists in gloo
    root = SIZE - 1
    at_root = values(dtype, 7, 5)
    dist.reduce(at_root, root, operation)

    with together():
        expected = reduced(name, everyone(dtype, 7, 5))
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(theirs, expected)
        if root == RANK:
            torch.testing.assert_close(at_root, expected)
        else:
            assert torch.equal(at_root, values(dtype, 7, 5)), "only the root's changes"


def collectives(dtype: torch.dtype, group: Any) -> dict[str, Any]:
    """The results of every collective that moves or sums, on the same inputs for whatever group."""
    x = values(dtype, 3, 4)
    found: dict[str, Any] = {}

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    found["broadcast"] = x.clone()
    dist.broadcast(found["broadcast"], SIZE - 1, group=group)
    found["all_gather"] = [empty(3, 4) for _ in range(SIZE)]
    dist.all_gather(found["all_gather"], x, group=group)
    found["all_gather_into_tensor"] = empty(3 * SIZE, 4)
    dist.all_gather_into_tensor(found["all_gather_into_tensor"], x, group=group)
    found["gather"] = [empty(3, 4) for _ in range(SIZE)] if RANK == SIZE - 1 else None
    dist.gather(x, found["gather"], SIZE - 1, group=group)
    found["scatter"] = empty(3, 4)
    parts = [x + x if rank % 2 else x for rank in range(SIZE)] if RANK == 0 else None
    dist.scatter(found["scatter"], parts, 0, group=group)
    found["all_to_all_single"] = empty(2 * SIZE, 3)
    dist.all_to_all_single(found["all_to_all_single"], values(dtype, 2 * SIZE, 3), group=group)
    rows = [rank + RANK for rank in range(SIZE)]
    found["all_to_all_single, uneven"] = empty(sum(rows), 3)
    dist.all_to_all_single(
        found["all_to_all_single, uneven"], values(dtype, sum(rows), 3), rows, rows, group=group
    )
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=names_of(DTYPES))
def test_moving(dtype: torch.dtype, gloo: Any, limit: None) -> None:
    ours = collectives(dtype, None)
    # gloo has no 16-bit integers and no complex numbers.
    theirs = collectives(dtype, gloo) if dtype not in (*COMPLEX, torch.int16, torch.bool) else None

    with together():
        all = everyone(dtype, 3, 4)
        assert torch.equal(ours["broadcast"], all[-1])
        assert torch.equal(torch.stack(ours["all_gather"]), all)
        assert torch.equal(ours["all_gather_into_tensor"], all.view(-1, 4))
        assert torch.equal(ours["scatter"], all[0] + all[0] if RANK % 2 else all[0])
        if RANK == SIZE - 1:
            assert torch.equal(torch.stack(ours["gather"]), all)
        swapped = everyone(dtype, 2 * SIZE, 3)[:, 2 * RANK : 2 * RANK + 2].reshape(-1, 3)
        assert torch.equal(ours["all_to_all_single"], swapped)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64], ids=names_of([*FLOATS, torch.int64]))
@pytest.mark.parametrize("name", ["SUM", "AVG", "MAX"])
def test_reduce_scatter(name: str, dtype: torch.dtype, limit: None) -> None:
    operation = getattr(ReduceOp, name)
    out = torch.zeros(3, 5, dtype=dtype)
    dist.reduce_scatter_tensor(out, values(dtype, 3 * SIZE, 5), operation)
    uneven = torch.zeros(RANK + 1, 2, dtype=dtype)
    parts = [values(dtype, rank + 1, 2, seed=rank) for rank in range(SIZE)]
    dist.reduce_scatter(uneven, parts, operation)

    with together():
        rows = slice(3 * RANK, 3 * RANK + 3)
        torch.testing.assert_close(out, reduced(name, everyone(dtype, 3 * SIZE, 5))[rows])
        torch.testing.assert_close(uneven, reduced(name, everyone(dtype, RANK + 1, 2, seed=RANK)))


UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", [*INTEGERS, *UNSIGNED], ids=names_of([*INTEGERS, *UNSIGNED]))
def test_average_of_integers(dtype: torch.dtype, limit: None) -> None:
    """The sum, in 32 bits at least, then divided towards zero: of -7 on two ranks -3."""
    limits = torch.iinfo(dtype)
    own = [3 + RANK, -3 - RANK, limits.max - RANK, limits.min + RANK, 0]
    bits = 8 * dtype.itemsize
    x = torch.tensor([number % 2**bits for number in own], dtype=torch.uint64).to(dtype)
    all, at_root, later, coalesced, functional = (x.clone() for _ in range(5))
    dist.all_reduce(all, ReduceOp.AVG)
    dist.reduce(at_root, SIZE - 1, ReduceOp.AVG)
    work = dist.all_reduce(later, ReduceOp.AVG, async_op=True)
    with dist._coalescing_manager():
        dist.all_reduce(coalesced, ReduceOp.AVG)
    part, single = torch.zeros_like(x), torch.zeros_like(x)
    dist.reduce_scatter(part, [x] * SIZE, ReduceOp.AVG)
    dist.reduce_scatter_tensor(single, x.repeat(SIZE), ReduceOp.AVG)
    functional = functional_collectives.all_reduce(x, "avg", dist.group.WORLD)
    work.wait()

    with together():
        sums = [3 * SIZE + sum(range(SIZE)), 0, limits.max * SIZE - sum(range(SIZE)), 0, 0]
        sums[1], sums[3] = -sums[0], limits.min * SIZE + sum(range(SIZE))
        if bits < 32 and not dtype.is_signed:
            sums[1] += 2**bits * SIZE
        held = sums if bits < 32 else [(total - limits.min) % 2**bits + limits.min for total in sums]
        expected = [abs(total) // SIZE * (1 if total > 0 else -1) for total in held]
        for found in (all, later, coalesced, part, single, functional):
            assert found.tolist() == expected
        assert at_root.tolist() == (expected if RANK == SIZE - 1 else x.tolist())


@no_exchange
def test_average_in_a_group_larger_than_int8() -> None:
    values = torch.tensor([-128, 127, -1], dtype=torch.int8)
    buffers._divide(values, 128)
    assert values.tolist() == [-1, 0, 0]


def test_lists_of_uneven_tensors(limit: None) -> None:
    gathered = [torch.zeros(rank + 1, 2) for rank in range(SIZE)]
    dist.all_gather(gathered, torch.full((RANK + 1, 2), float(RANK)))
    swapped = [torch.zeros(rank + 2 * RANK) for rank in range(SIZE)]
    dist.all_to_all(
        swapped, [torch.full((RANK + 2 * rank,), float(10 * RANK + rank)) for rank in range(SIZE)]
    )

    with together():
        for rank in range(SIZE):
            assert (gathered[rank] == rank).all()
            assert (swapped[rank] == 10 * rank + RANK).all()


def test_objects() -> None:
    here: list[Any] = [None] * SIZE
    dist.all_gather_object(here, {"rank": RANK, "text": "x" * RANK})
    said = ["from 0", RANK] if RANK == 0 else [None, None]
    dist.broadcast_object_list(said, 0)
    at_root: Any = [None] * SIZE if RANK == 0 else None
    dist.gather_object(RANK, at_root, 0)
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, [f"for {rank}" for rank in range(SIZE)] if RANK == 0 else None, 0)

    with together():
        assert here == [{"rank": rank, "text": "x" * rank} for rank in range(SIZE)]
        assert said == ["from 0", 0]
        assert at_root == (list(range(SIZE)) if RANK == 0 else None)
        assert mine == [f"for {RANK}"]


def test_coalesced() -> None:
    pair = [torch.full((3,), RANK + 1.0), torch.full((2, 2), RANK + 1, dtype=torch.int64)]
    with dist._coalescing_manager():
        dist.all_reduce(pair[0])
        dist.all_reduce(pair[0])
    dist.all_reduce_coalesced(pair[1:])
    rows = [[torch.zeros(2), torch.zeros(1)] for _ in range(SIZE)]
    dist.all_gather_coalesced(rows, [torch.full((2,), float(RANK)), torch.full((1,), -float(RANK))])

    with together():
        total = sum(range(1, SIZE + 1))
        assert (pair[0] == total * SIZE).all()
        assert (pair[1] == total).all()
        for rank, (two, one) in enumerate(rows):
            assert (two == rank).all()
            assert (one == -rank).all()


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(999, generator=torch.Generator().manual_seed(RANK)).bfloat16()
    total = x.clone()
    dist.all_reduce(total)
    all = WORLD.allgather(x)

    with together():
        exact = torch.stack([each.float() for each in all]).sum(0)
        assert torch.equal(total, exact.bfloat16())


# Memory of other kinds.


def test_tensors_without_order_or_values() -> None:
    transposed = torch.full((4, 3), RANK + 1.0).t()
    strided = torch.zeros(6, 2)
    strided[::2] = RANK
    nothing, number = torch.zeros(0, 3), torch.tensor(RANK + 1.0)
    for tensor in (transposed, strided[::2], nothing, number):
        dist.all_reduce(tensor)
    dist.broadcast(transposed, 0)
    out = torch.zeros(3, SIZE).t()
    dist.all_gather_into_tensor(out, torch.full((1, 3), float(RANK)))

    with together():
        assert (transposed == sum(range(1, SIZE + 1))).all()
        assert (strided[::2] == sum(range(SIZE))).all()
        assert (strided[1::2] == 0).all(), "between them nothing changes"
        assert nothing.shape == (0, 3)
        assert number == sum(range(1, SIZE + 1))
        assert torch.equal(out, torch.arange(SIZE).float()[:, None].expand(SIZE, 3))


def test_gradients_may_be_reduced_in_place() -> None:
    parameter = nn.Parameter(torch.ones(3))
    dist.broadcast(parameter, 0)  # as DistributedDataParallel does
    dist.all_reduce(parameter.data)
    with together():
        assert (parameter == SIZE).all()


# In the background.


def test_many_at_once() -> None:
    tensors = [torch.full((1 + 100 * i,), float(RANK + i)) for i in range(30)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    last = torch.ones(1)
    dist.all_reduce(last)  # after all the others
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


def test_beside_synchronized_layers() -> None:
    """Reductions under way while layers exchange: two streams of messages that must not meet."""
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
    """Each takes what the one before has left, in memory without order too."""
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
        try:
            dist.irecv(late, 1).wait(timedelta(seconds=0.2))
        except CollectiveTimeoutError as problem:
            error = str(problem)
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


def test_errors_wait_for_whoever_waits() -> None:
    work = dist.all_reduce(torch.zeros(3, dtype=torch.bool), ReduceOp.AVG, async_op=True)
    with pytest.raises(TypeError, match=r"AVG of torch\.bool is not defined"):
        work.wait()
    with together():
        assert isinstance(work.exception(), TypeError)
        assert work.is_completed()
        assert not work.is_success()


# From rank to rank.


@several
def test_around_a_ring(limit: None) -> None:
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    out = [torch.zeros(40), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2).t()]
    works = [dist.irecv(tensor, before, tag=tag) for tag, tensor in enumerate(out)]
    for tag in (2, 0, 1):  # the tag decides, not the order
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
    if RANK == 0:
        try:
            dist.recv(torch.zeros(4), 1, tag=1)
        except ValueError as error:
            wrong = str(error)
    elif RANK == 1:
        dist.send(torch.zeros(3), 0, tag=1)

    with together():
        if RANK == 0:
            assert sorted(seen) == [(rank, rank) for rank in range(1, SIZE)]
            assert "expected 16 bytes, 12 came" in wrong


# Groups.


def test_groups_of_some() -> None:
    ranks = list(range(max(SIZE - 1, 1)))
    group = dist.new_group(ranks)
    x = torch.ones(2)
    inside = RANK in ranks
    if inside:
        dist.all_reduce(x, group=group)
    pairs, _ = dist.new_subgroups(1)
    alone = torch.ones(1)
    dist.all_reduce(alone, group=pairs)
    half = dist.group.WORLD.split_group([0])
    if inside:
        dist.destroy_process_group(group)
    error = None
    if inside:
        try:
            group.allreduce([x])
        except MPISyncBNError as problem:
            error = str(problem)

    with together():
        assert alone == 1
        assert (half is not None) == (RANK == 0)
        if inside:
            assert (x == len(ranks)).all()
            assert "was destroyed" in str(error)
        else:
            assert group is dist.GroupMember.NON_GROUP_MEMBER


@pytest.mark.parametrize("backend", ["mpi4py", "gloo"])
def test_layers_in_groups_of_torch(backend: str) -> None:
    ranks = list(range(SIZE // 2, SIZE))
    group = dist.new_group(ranks, backend=backend)
    layer: Any = None
    if RANK in ranks:
        layer = mpisyncbn.SyncBatchNorm(3, momentum=1.0, process_group=group)
        again = mpisyncbn.SyncBatchNorm(3, process_group=group)
        layer(torch.full((RANK + 2, 3), float(RANK)))
    converted = mpisyncbn.convert_sync_batchnorm(nn.BatchNorm1d(3, momentum=1.0), dist.group.WORLD)
    converted(torch.full((RANK + 2, 3), float(RANK)))

    with together():
        if layer is not None:
            assert layer.process_group is again.process_group is group
            assert layer.communicator is again.communicator
            assert layer.communicator.size == len(ranks)
            weights = torch.tensor([rank + 2.0 for rank in ranks])
            mean = (weights * torch.tensor(ranks)).sum() / weights.sum()
            torch.testing.assert_close(layer.running_mean, mean.expand(3))
        weights = torch.arange(SIZE) + 2.0
        mean = (weights * torch.arange(SIZE)).sum() / weights.sum()
        torch.testing.assert_close(converted.running_mean, mean.expand(3))


def test_names() -> None:
    with together():
        assert dist.get_backend() == "mpi4py"
        assert (dist.get_rank(), dist.get_world_size()) == (RANK, SIZE)
        assert isinstance(dist.group.WORLD, distributed.ProcessGroup)
        assert f"size={SIZE}" in repr(dist.group.WORLD)
        with pytest.raises(ValueError, match="initialized already"):
            mpisyncbn.init_process_group()
        with pytest.raises(TypeError, match="expected an mpi4py communicator"):
            mpisyncbn.init_process_group("world")


def test_what_torch_builds_on_a_group(tmp_path: Any) -> None:
    """Functional and compiled collectives, meshes, distributed tensors, checkpoints in shards."""
    group, ones = dist.group.WORLD, torch.ones(4 * SIZE)
    summed = functional_collectives.all_reduce(ones, "sum", group)
    scattered = functional_collectives.reduce_scatter_tensor(ones, "sum", 0, group)
    gathered = functional_collectives.all_gather_tensor(scattered, 0, group)
    compiled = torch.compile(
        lambda x: functional_collectives.all_reduce(2 * x, "sum", group) + 1, backend="aot_eager"
    )(ones)
    mesh = init_device_mesh("cpu", (SIZE,))
    sharded = distribute_tensor(torch.arange(3.0 * SIZE), mesh, [Shard(0)])
    whole = (sharded * 2).full_tensor()
    folder = WORLD.bcast(tmp_path)
    checkpoint.save({"tensor": sharded}, checkpoint_id=folder)
    loaded = {"tensor": distribute_tensor(torch.zeros(3 * SIZE), mesh, [Shard(0)])}
    checkpoint.load(loaded, checkpoint_id=folder)
    restored = loaded["tensor"].full_tensor()

    with together():
        assert (summed == SIZE).all()
        assert torch.equal(gathered, torch.full((4 * SIZE,), float(SIZE)))
        assert (compiled == 2 * SIZE + 1).all()
        assert torch.equal(whole, 2 * torch.arange(3.0 * SIZE))
        assert torch.equal(restored, torch.arange(3.0 * SIZE))


def test_distributed_tensors_are_no_input_of_a_layer() -> None:
    """Nor a weight; what a functional collective gives is, once its values are there."""
    sharded = distribute_tensor(torch.ones(2 * SIZE, 3), init_device_mesh("cpu", (SIZE,)), [Shard(0)])
    pending = functional_collectives.all_reduce(torch.ones(4, 3), "sum", dist.group.WORLD)
    layer = mpisyncbn.SyncBatchNorm(3)
    y, local = layer(pending), layer(sharded.to_local())
    words = (
        rf"to be a plain tensor, got a DTensor \(on rank {RANK} of {SIZE}\): hand over .*\.to_local\(\), or"
    )
    with together():
        assert y.shape == (4, 3)
        assert local.shape == (2, 3)
        for training in (True, False):
            with pytest.raises(TypeError, match=f"expected input {words}"):
                layer.train(training)(sharded)
        with pytest.raises(TypeError, match=f"expected weight {words}"):
            mpisyncbn.sync_batch_norm(torch.ones(2, 3), None, None, sharded)


def test_layers_in_a_group_that_is_gone() -> None:
    group = dist.new_group(use_local_synchronization=True)
    dist.destroy_process_group(group)
    with together(), pytest.raises(MPISyncBNError, match="was freed"):
        mpisyncbn.SyncBatchNorm(3, process_group=group)


VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
SUBSETS = [names for count in range(5) for names in itertools.combinations(VARIABLES, count)]


def rendezvous(**given: int) -> tuple[int, int]:
    """Rank and size, as torch finds them by default."""
    _, rank, size = next(dist.rendezvous("env://", **given))
    return rank, size


@pytest.mark.parametrize("names", SUBSETS, ids=lambda names: " ".join(names) or "none")
def test_variables_of_other_launchers(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """All four are torchrun's, whose ranks MPI does not know; where one is missing, MPI knows better."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value if name in names else "")  # empty is not set, to torch too
    found = rendezvous()
    with together():
        assert found == ((0, 1) if len(names) == 4 else (RANK, SIZE))


def test_rank_and_size_as_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    agreeing = rendezvous(rank=RANK, world_size=SIZE)
    errors = []
    for given in ({"rank": RANK + 1}, {"rank": RANK, "world_size": SIZE + 1}):
        with pytest.raises(ValueError, match=f"expected rank {RANK} of {SIZE}, as MPI counts") as error:
            rendezvous(**given)
        errors.append(error)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    addressed = rendezvous(rank=0, world_size=1)
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("WORLD_SIZE", str(SIZE + 1))
    if SIZE == 1:  # there MPI may not know better: somebody counts on more ranks
        with pytest.raises(ValueError, match="as MPI counts"):
            rendezvous()
    with together():
        assert agreeing == (RANK, SIZE)
        assert len(errors) == 2
        assert addressed == (0, 1), "torch's own rendezvous"


# What must not hang.


@several
def test_init_with_some_ranks() -> None:
    half = WORLD.Split(RANK % 2)
    with together(), pytest.raises(ValueError, match=f"all {SIZE} ranks of the world"):
        mpisyncbn.init_process_group(half)
    half.Free()


def mismatched() -> dict[str, Any]:
    first = RANK == 0
    return {
        "shapes": lambda: dist.all_reduce(torch.zeros(3 if first else 4)),
        "dtypes": lambda: dist.all_reduce(torch.zeros(3, dtype=torch.float32 if first else torch.float64)),
        "operations": lambda: dist.all_reduce(torch.zeros(3), ReduceOp.SUM if first else ReduceOp.MAX),
        "roots": lambda: dist.broadcast(torch.zeros(3), 0 if first else 1),
        "collectives": lambda: dist.barrier() if first else dist.all_reduce(torch.zeros(3)),
        "one rank refuses": lambda: dist.all_reduce(
            torch.zeros(3, dtype=torch.bool), ReduceOp.AVG if first else ReduceOp.SUM
        ),
    }


@several
@pytest.mark.parametrize("what", list(mismatched()))
def test_mismatches(what: str) -> None:
    error = None
    try:
        mismatched()[what]()
    except CollectiveMismatchError as problem:
        error = str(problem)
    after = torch.ones(1)
    dist.all_reduce(after)  # the group lives on

    with together():
        assert error is not None
        assert all(f"rank {rank} on " in error for rank in range(SIZE))
        assert after == SIZE


@several
def test_splits_that_do_not_fit() -> None:
    rows = [1] * SIZE
    sent = list(rows)
    if RANK == 0:
        sent[1] += 1
    error = None
    try:
        dist.all_to_all_single(torch.zeros(SIZE), torch.zeros(sum(sent)), rows, sent)
    except ValueError as problem:
        error = str(problem)
    with together():
        assert "rank 0 sends 8 bytes to rank 1, which expects 4" in str(error)


@several
def test_a_rank_that_does_not_come() -> None:
    group, watched = (dist.new_group(timeout=timedelta(seconds=1)) for _ in range(2))
    errors = []
    if RANK == 0:
        for call in (lambda: dist.all_reduce(torch.zeros(3), group=group), lambda: dist.barrier(group=group)):
            try:
                call()
            except MPISyncBNError as problem:
                errors.append(problem)
    if RANK < SIZE - 1:
        try:
            distributed.monitored_barrier(watched)
        except CollectiveTimeoutError as problem:
            errors.append(problem)

    with together():
        if RANK == 0:
            late, unusable, missing = errors
            assert isinstance(late, CollectiveTimeoutError)
            assert "all_reduce SUM of float32 (3,)" in str(late)
            assert f"rank 0 of {SIZE} waited 1 s" in str(late)
            assert "unusable" in str(unusable)
            assert f"ranks [{SIZE - 1}] did not come" in str(missing)
        elif RANK < SIZE - 1:
            assert "did not come" in str(errors[0])


def test_an_interrupted_collective_ends_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    group = dist.new_group()
    abandoned = len(mpisyncbn.diagnostics._abandoned)
    monkeypatch.setattr(mpisyncbn.steps, "patiently", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dist.all_reduce(torch.zeros(3), group=group)
    monkeypatch.undo()
    with pytest.raises(MPISyncBNError, match=r"unusable since all_reduce SUM .* was interrupted"):
        dist.all_reduce(torch.zeros(3), group=group)
    assert len(mpisyncbn.diagnostics._abandoned) == abandoned + 1, "MPI may write there still"
    watched = [group._wire.presence in mpisyncbn.presence.everyone()]
    dist.destroy_process_group(group)
    watched.append(group._wire.presence in mpisyncbn.presence.everyone())
    assert watched == [SIZE > 1, False], "at its end a rank must not wait for others in it"


def test_monitored_barrier() -> None:
    distributed.monitored_barrier()
    distributed.monitored_barrier(timeout=timedelta(seconds=30))


def test_arguments_that_nobody_can_use() -> None:
    sparse = torch.eye(3).to_sparse()
    cases = {
        "expected a dense tensor": lambda: dist.all_reduce(sparse),
        "no torch.float8_e4m3fn to reduce": lambda: dist.all_reduce(torch.zeros(3).to(torch.float8_e4m3fn)),
        "expected a root from 0": lambda: dist.group.WORLD.broadcast([torch.zeros(3)], options(root=SIZE)),
        "splits with a sum of": lambda: dist.group.WORLD.all_to_all_single(
            torch.zeros(SIZE + 1), torch.zeros(SIZE + 1), [SIZE] * SIZE, [SIZE] * SIZE, options(0)
        ),
        "one tensor for each": lambda: dist.group.WORLD.allgather(
            [[torch.zeros(3)] * (SIZE + 1)], [torch.zeros(3)], options(0)
        ),
    }
    for message, call in cases.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def options(root: int) -> Any:
    chosen = dist.BroadcastOptions()
    chosen.rootRank, chosen.asyncOp = root, False
    return chosen


def test_any_dtype_moves() -> None:
    x = torch.full((5,), RANK + 1.0).to(torch.float8_e4m3fn)
    dist.broadcast(x, 0)
    with together():
        assert (x.float() == 1).all()
