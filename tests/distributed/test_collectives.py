"""Every collective of torch.distributed, with every dtype, beside gloo and exact results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed import _functional_collectives as functional_collectives

from mpisyncbn.distributed import mpi_collectives
from support.ranks import WORLD, no_exchange, together

RANK, SIZE = WORLD.rank, WORLD.size
pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch 2.13 renames collectives
]

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


@pytest.fixture(scope="module")
def gloo(world: None) -> Any:
    return dist.new_group(backend="gloo")


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
        theirs = ours  # gloo does not have this operation for this dtype
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
    """Return the results of collectives that move data, by name. Groups get the same inputs."""
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
    theirs = collectives(dtype, gloo) if dtype not in (*COMPLEX, torch.int16) else None

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


def test_an_output_that_is_a_conjugate(limit: None) -> None:
    out, given = torch.zeros(2, dtype=torch.complex64), torch.arange(2.0 * SIZE) * (1 + 1j)
    dist.reduce_scatter_tensor(out.conj(), given)
    with together():
        torch.testing.assert_close(out.conj().resolve_conj(), SIZE * given[2 * RANK : 2 * RANK + 2])


UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", [*INTEGERS, *UNSIGNED], ids=names_of([*INTEGERS, *UNSIGNED]))
def test_average_of_integers(dtype: torch.dtype, limit: None) -> None:
    """AVG of integers is the sum, in at least 32 bits, divided and truncated towards zero.

    On two ranks, a sum of -7 gives -3.
    """
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
    mpi_collectives._divide(values, 128)
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


def test_parts_of_one_value_or_none_may_have_any_stride() -> None:
    rows, empty = torch.arange(1.0, 2 * SIZE + 1).reshape(2, SIZE), torch.ones(4)[::2][:0]
    part, summed = torch.zeros(1), torch.zeros(1)
    columns = list(rows[:1].split(1, dim=1))
    dist.scatter(part, columns if RANK == 0 else None, src=0)
    dist.reduce_scatter(summed, columns)
    swapped = [torch.zeros(1 if rank == RANK else 0) for rank in range(SIZE)]
    dist.all_to_all(swapped, [columns[rank][0] if rank == RANK else empty for rank in range(SIZE)])

    with together():
        assert (part, summed, swapped[RANK]) == (RANK + 1, SIZE * (RANK + 1), RANK + 1)


def test_gradients_may_be_reduced_in_place() -> None:
    parameter = nn.Parameter(torch.ones(3))
    dist.broadcast(parameter, 0)  # as DistributedDataParallel does
    dist.all_reduce(parameter.data)
    with together():
        assert (parameter == SIZE).all()


def test_input_may_overlap_output() -> None:
    """The input of a collective may overlap its output, as when FSDP gathers shards in place.

    MPI forbids that: MPICH raises an error, others may send what they have just received.
    """
    gathered, scattered, swapped = torch.zeros(3 * SIZE), torch.ones(3 * SIZE) * RANK, torch.zeros(SIZE)
    mine = gathered[3 * RANK : 3 * (RANK + 1)]
    mine += RANK
    dist.group.WORLD.all_gather_single(gathered, mine).wait()
    part = scattered[:3]
    dist.group.WORLD.reduce_scatter_single(part, scattered).wait()
    swapped += torch.arange(SIZE) + SIZE * RANK
    dist.group.WORLD.all_to_all_single(swapped, swapped).wait()
    with together():
        assert gathered.tolist() == [r for r in range(SIZE) for _ in range(3)]
        assert part.tolist() == [sum(range(SIZE))] * 3
        assert swapped.tolist() == [RANK + SIZE * r for r in range(SIZE)]


def test_any_dtype_moves() -> None:
    x = torch.full((5,), RANK + 1.0).to(torch.float8_e4m3fn)
    dist.broadcast(x, 0)
    with together():
        assert (x.float() == 1).all()
