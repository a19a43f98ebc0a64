"""Collectives raise errors if ranks disagree, a rank is missing or arguments are wrong."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.distributed import ReduceOp

import mpisyncbn
from mpisyncbn import CollectiveMismatchError, CollectiveTimeoutError, MPISyncBNError, distributed
from support.ranks import WORLD, error_of, several, together

RANK, SIZE = WORLD.rank, WORLD.size
_YEAR = 365 * 24 * 3600  # seconds
pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch 2.13 renames collectives
]


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
    error = error_of(mismatched()[what], CollectiveMismatchError)
    after = torch.ones(1)
    dist.all_reduce(after)  # the group still works

    with together():
        assert error is not None
        assert all(f"rank {rank} on " in str(error) for rank in range(SIZE))
        assert after == SIZE


class WithoutMemory(torch.Tensor):
    """A tensor that has no memory of its own, as a DTensor has none."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


@several
def test_an_output_without_memory_for_its_values_on_one_rank() -> None:
    cases = {
        "memory of its own": torch.Tensor._make_wrapper_subclass(WithoutMemory, (3,)),
        "got an expanded tensor of shape (3,)": torch.ones(1).expand(3),
    }
    errors = []
    for x in cases.values():
        pair = [x if RANK == 0 else torch.ones(3), torch.ones(1)]
        errors.append(error_of(lambda pair=pair: dist.all_reduce_coalesced(pair), Exception))
    after = torch.ones(1)
    dist.all_reduce(after)  # the group still works
    with together():
        for error, words in zip(errors, cases, strict=True):
            assert isinstance(error, (TypeError, ValueError, CollectiveMismatchError)), error
            assert words in str(error)
        assert after == SIZE


@several
def test_splits_that_do_not_fit() -> None:
    rows = [1] * SIZE
    sent = list(rows)
    if RANK == 0:
        sent[1] += 1
    out, x = torch.zeros(SIZE), torch.zeros(sum(sent))
    error = error_of(lambda: dist.all_to_all_single(out, x, rows, sent), ValueError)
    with together():
        assert "rank 0 sends 8 bytes to rank 1, which expects 4" in str(error)


@several
def test_a_rank_that_does_not_come() -> None:
    group, watched = (dist.new_group(timeout=timedelta(seconds=1)) for _ in range(2))
    errors: list[Any] = []
    if RANK == 0:
        for call in (lambda: dist.all_reduce(torch.zeros(3), group=group), lambda: dist.barrier(group=group)):
            errors.append(error_of(call, MPISyncBNError))
    if RANK < SIZE - 1:
        errors.append(error_of(lambda: distributed.monitored_barrier(watched), CollectiveTimeoutError))
    WORLD.barrier()
    if RANK > 0:  # too late
        errors.append(error_of(lambda: dist.all_reduce(torch.zeros(3), group=group), MPISyncBNError))

    with together():
        if RANK > 0:
            assert "unusable since rank 0 waited too long in it (on rank" in str(errors[-1])
        if RANK == 0:
            late, unusable, missing = errors
            assert isinstance(late, CollectiveTimeoutError)
            assert "all_reduce SUM of float32 (3,)" in str(late)
            assert f"rank 0 of {SIZE} waited 1 s" in str(late)
            found = str(late).splitlines()[-SIZE:]
            here = f" on {socket.gethostname()}"
            assert found[0].startswith(f"  rank 0{here} waits in exchange number 1, all_reduce SUM of")
            missing_one = f"{here} is missing: it has done 0 exchanges of this group, and is at /"
            assert all(
                line.startswith(f"  rank {rank}{missing_one}") for rank, line in enumerate(found) if rank
            )
            assert "unusable" in str(unusable)
            assert f"ranks [{SIZE - 1}] did not come" in str(missing)
        elif RANK < SIZE - 1:
            assert "did not come" in str(errors[0])


@pytest.mark.parametrize(
    ("variable", "seconds"), [("", 1800), ("7.5", 7.5), ("0", 100 * _YEAR), ("1e300", 100 * _YEAR)]
)
def test_the_default_timeout(variable: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPISYNCBN_TIMEOUT", variable)
    groups = [dist.new_group(), dist.new_group(timeout=timedelta(seconds=5))]
    works = [dist.all_reduce(torch.ones(1), group=group, async_op=True) for group in groups]
    for group, work in zip(groups, works, strict=True):
        work.wait()
        dist.destroy_process_group(group)

    assert [group._timeout.total_seconds() for group in groups] == [seconds, 5]


def test_an_interrupted_collective_ends_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    group = dist.new_group()
    abandoned = len(mpisyncbn.liveness.pending._kept_alive)
    monkeypatch.setattr(mpisyncbn.distributed.checked, "wait_until", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dist.all_reduce(torch.zeros(3), group=group)
    monkeypatch.undo()
    with pytest.raises(MPISyncBNError, match=r"unusable since all_reduce SUM .* was interrupted"):
        dist.all_reduce(torch.zeros(3), group=group)
    assert len(mpisyncbn.liveness.pending._kept_alive) == abandoned + 2, "MPI may write to the message still"
    watched = [group._collective_group.rank_status in mpisyncbn.liveness.rank_status.all_statuses()]
    dist.destroy_process_group(group)
    watched.append(group._collective_group.rank_status in mpisyncbn.liveness.rank_status.all_statuses())
    assert watched == [SIZE > 1] * 2, "at their end ranks meet in it, since its communicator was not freed"


def test_monitored_barrier() -> None:
    distributed.monitored_barrier()
    distributed.monitored_barrier(timeout=timedelta(seconds=30))


def test_bad_arguments() -> None:
    sparse = torch.eye(3).to_sparse()
    cases = {
        "expected a dense tensor": lambda: dist.all_reduce(sparse),
        "no torch.float8_e4m3fn to reduce": lambda: dist.all_reduce(torch.zeros(3).to(torch.float8_e4m3fn)),
        "expected a root from 0": lambda: dist.group.WORLD.broadcast([torch.zeros(3)], options(root=SIZE)),
        "split sizes with a sum of": lambda: dist.group.WORLD.all_to_all_single(
            torch.zeros(SIZE + 1), torch.zeros(SIZE + 1), [SIZE] * SIZE, [SIZE] * SIZE, options(0)
        ),
        "tensors, one for each rank": lambda: dist.group.WORLD.allgather(
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


def test_refusals_of_single_calls() -> None:
    x, world = torch.ones(3), dist.group.WORLD
    sent, received = world.send([x], RANK, 5), world.recv([torch.zeros(3)], RANK, 5)
    with pytest.raises(NotImplementedError, match=r"recv from rank .* have no future"):
        received.get_future()
    received.wait()
    sent.wait()
    with pytest.raises(ValueError, match=f"send: expected a rank from 0 to {SIZE - 1}, got {SIZE}"):
        world.send([x], SIZE, 0)
    largest = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    words = f"expected a tag from 0 to {largest} other than 32767, .* got"
    for tag in -1, 32767, largest + 1:
        for call in world.send, world.recv, lambda tensors, _, tag: world.recv_anysource(tensors, tag):
            with pytest.raises(ValueError, match=f"{words} {tag} "):
                call([x], RANK, tag)
    with pytest.raises(ValueError, match="expected the dtypes of output and input to be equal"):
        dist.reduce_scatter_tensor(x[:1].double(), torch.ones(SIZE))
    with pytest.raises(TypeError, match="expected a group of backend mpi4py, got 'another'"):
        distributed.monitored_barrier("another")
    dist.all_reduce(x)  # the group still works
    assert x.tolist() == [SIZE] * 3


def test_a_timeout_that_is_a_number_and_a_model_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"expected timeout to be a datetime.timedelta, got int"):
        distributed.ProcessGroup(MPI.COMM_SELF, 60)
    with pytest.raises(TypeError, match=r"got int.*: pass timedelta\(seconds=...\)"):
        mpisyncbn.init_process_group(timeout=60)
    group = distributed.ProcessGroup(MPI.COMM_SELF.Dup(), timedelta(seconds=60))
    with pytest.raises(TypeError, match=r"expected timeout to be a datetime.timedelta, got int"):
        distributed.monitored_barrier(group, 60)
    for given in timedelta(0), timedelta(seconds=-1), timedelta.max:
        for call in (
            lambda given=given: mpisyncbn.init_process_group(timeout=given),
            lambda given=given: distributed.monitored_barrier(group, given),
            lambda given=given: dist.new_group([RANK], given, use_local_synchronization=True),
        ):
            with pytest.raises(
                ValueError, match=r"a timeout of more than 0 and at most 100 years, got .* \(on rank"
            ):
                call()
    group.shutdown()
    with (
        pytest.raises(TypeError, match="expected a DistributedDataParallel, got Linear"),
        distributed.join(nn.Linear(1, 1)),
    ):
        pass
