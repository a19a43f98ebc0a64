"""Groups of ranks: a layer normalizes over its group, and its messages meet no others."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

import mpisyncbn
from mpisyncbn import Communicator, MPISyncBNError, SyncBatchNorm, functional, new_group, new_subgroups
from mpisyncbn.comm.groups import resolve
from support.jobs import run_alone
from support.oracle import distance, local_batch, oracle, shard
from support.ranks import WORLD, several

RANK, SIZE = WORLD.rank, WORLD.size
HALF = RANK // 2


def data() -> tuple[torch.Tensor, torch.Tensor]:
    shape = (local_batch(), 3, 4)
    return shard(shape, mean=RANK), shard(shape, seed=1)


def exchange(group: Any) -> np.ndarray:
    """Make one small exchange: return the mean of the world ranks of the group, in 3 channels."""
    return functional.batch_norm_forward(np.full((2, 3), float(RANK)), process_group=group)[1].mean


# Each function returns a process_group, and a communicator of the same ranks in order.
GROUPS: dict[str, Callable[[], tuple[Any, MPI.Comm]]] = {
    "None": lambda: (None, WORLD),
    "COMM_WORLD": lambda: (WORLD, WORLD),
    "Communicator": lambda: (Communicator(), WORLD),
    "Communicator of Communicator": lambda: (Communicator(Communicator(WORLD)), WORLD),
    "COMM_SELF": lambda: (MPI.COMM_SELF, MPI.COMM_SELF),
    "Split": lambda: (WORLD.Split(HALF), WORLD.Split(HALF)),
    "reversed Split": lambda: (WORLD.Split(0, -RANK), WORLD.Split(0, -RANK)),
    "Create_group": lambda: (
        WORLD.Create_group(WORLD.group.Incl(range(RANK % 2, SIZE, 2))),
        WORLD.Split(RANK % 2),
    ),
    "Create_cart": lambda: (WORLD.Create_cart([SIZE]), WORLD),
    "new_group": lambda: (new_group(range(SIZE - 1, -1, -1)), WORLD),
    "new_subgroups(1)": lambda: (new_subgroups(1), MPI.COMM_SELF),
    "new_subgroups(size)": lambda: (new_subgroups(SIZE), WORLD),
    "new_subgroups()": lambda: (new_subgroups(), WORLD.Split_type(MPI.COMM_TYPE_SHARED)),
    "new_subgroups of Split": lambda: (new_subgroups(1, WORLD.Split(HALF)), MPI.COMM_SELF),
}


@pytest.mark.parametrize("name", GROUPS)
def test_statistics_are_those_of_the_group(name: str) -> None:
    group, comm = GROUPS[name]()
    x, dy = data()
    y, stats = functional.batch_norm_forward(x.numpy(), process_group=group)
    results = [(torch.from_numpy(y), torch.from_numpy(stats.mean))]
    gradients = [
        torch.from_numpy(functional.batch_norm_backward(dy.numpy(), x.numpy(), stats, process_group=group)[0])
    ]
    converted = mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3, momentum=1.0)), group)
    layers = [SyncBatchNorm(3, momentum=1.0, process_group=group), converted[0]]
    running = torch.zeros(3), torch.ones(3)
    for call in (
        *layers,
        lambda x: mpisyncbn.sync_batch_norm(x, *running, momentum=1.0, process_group=group),
    ):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, dy)
        results.append((y.detach(), getattr(call, "running_mean", running[0])))
        gradients.append(gradient)
    expected = oracle(x, dy, comm=comm)
    for y, mean in results:
        assert distance(y, expected.y) < 1e-5
        assert distance(mean, expected.mean) < 1e-5
    for gradient in gradients:
        assert distance(gradient, expected.dx) < 1e-5


@pytest.mark.parametrize("kind", [list, np.array, iter])
def test_new_group_has_its_ranks_in_ascending_order(kind: Any) -> None:
    ranks = sorted({SIZE - 1, 0})
    group = new_group(kind(ranks[::-1]))
    if RANK not in ranks:
        assert group is None
    else:
        mean = exchange(group)
        assert (group.rank, group.size) == (ranks.index(RANK), len(ranks))
        assert mean == pytest.approx(np.full(3, np.mean(ranks)))


@pytest.mark.parametrize("ranks", [[], [0, 0], [SIZE], [-1], [0.0], ["a"], None], ids=repr)
def test_new_group_with_a_wrong_list_on_one_rank_raises_on_every_rank(ranks: Any) -> None:
    match = rf"ranks: expected distinct ranks from 0 to {SIZE - 1}, at least one, got .* on rank {SIZE - 1}"
    with pytest.raises(ValueError, match=match):
        new_group(ranks if RANK == SIZE - 1 else [0])


@several
def test_groups_that_differ_between_ranks_raise_on_every_rank() -> None:
    last = RANK == SIZE - 1
    with pytest.raises(ValueError, match=r"ranks: expected the same on every rank, got \[.* on rank"):
        new_group([0] if last else [0, 1])
    with pytest.raises(ValueError, match=r"group_size: expected the same on every rank, got .* on rank"):
        new_subgroups(1 if last else None)


def test_new_subgroups_are_consecutive_ranks() -> None:
    for size in (s for s in range(1, SIZE + 1) if SIZE % s == 0):
        group = new_subgroups(size)
        mean = exchange(group)
        first = RANK - RANK % size
        assert (group.rank, group.size) == (RANK - first, size)
        assert mean == pytest.approx(np.full(3, first + (size - 1) / 2))


@pytest.mark.parametrize("size", [0, -1, SIZE + 1, 1.5, "1"])
def test_new_subgroups_of_a_wrong_size_on_one_rank_raises_on_every_rank(size: Any) -> None:
    match = f"group_size: expected a divisor of the {SIZE} ranks, or None, got {size!r} on rank {SIZE - 1}"
    with pytest.raises(ValueError, match=match):
        new_subgroups(size if RANK == SIZE - 1 else SIZE)


def test_a_communicator_resolves_to_the_same_group_always() -> None:
    comm, another = WORLD.Split(0), WORLD.Split(0)
    group = resolve(comm)
    exchange(comm)
    copied = comm.Dup()  # Dup may copy attributes
    assert resolve(comm) is group
    assert SyncBatchNorm(3, process_group=comm).communicator is group
    assert resolve(MPI.Comm.fromhandle(comm.handle)) is group
    assert resolve(another) is not group
    assert resolve(copied) is not group
    assert resolve(WORLD) is resolve(None) is resolve(resolve(None))


def test_a_handle_that_is_used_again_is_another_group() -> None:
    first = WORLD.Split(0)
    group = resolve(first)
    exchange(first)
    first.Free()
    second = MPI.COMM_SELF.Split(0)  # Open MPI and MPICH give it the handle of the first
    mean = exchange(second)
    assert resolve(second) is not group
    assert mean == pytest.approx(np.full(3, RANK))


def test_messages_of_the_user_never_meet_ours() -> None:
    comm = WORLD.Dup()
    x, dy = data()
    length = 2 * 3 + 3  # as long as the package's own message
    received, total = np.zeros(length), np.ones(length)
    pending = [comm.Irecv(received, MPI.ANY_SOURCE, MPI.ANY_TAG), comm.Iallreduce(MPI.IN_PLACE, total)]
    y, stats = functional.batch_norm_forward(x.numpy(), process_group=comm)
    comm.Isend(np.full(length, float(RANK)), (RANK + 1) % SIZE, tag=7).Wait()
    functional.batch_norm_backward(dy.numpy(), x.numpy(), stats, process_group=comm)
    MPI.Request.Waitall(pending)
    expected = oracle(x, dy)
    assert (received == (RANK - 1) % SIZE).all()
    assert (total == SIZE).all()
    assert distance(torch.from_numpy(y), expected.y) < 1e-5


def test_the_users_settings_of_a_communicator_stay() -> None:
    comm = WORLD.Dup()
    keyval = MPI.Comm.Create_keyval(copy_fn=True)
    comm.Set_attr(keyval, "mine")
    comm.Set_name("mine")
    comm.Set_errhandler(MPI.ERRORS_ARE_FATAL)
    exchange(comm)
    fatal, ours = comm.Get_errhandler(), resolve(comm).comm.Get_errhandler()
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    assert (fatal, ours) == (MPI.ERRORS_ARE_FATAL, MPI.ERRORS_RETURN)
    assert (comm.Get_attr(keyval), comm.Get_name()) == ("mine", "mine")


def test_only_the_first_exchange_is_collective() -> None:
    comm = WORLD.Dup()
    layer = SyncBatchNorm(3, process_group=comm)
    if RANK == 0:
        Communicator()
        other = nn.Sequential(SyncBatchNorm(3, process_group=comm), SyncBatchNorm(5))
        mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), comm)
        other[0].load_state_dict(copy.deepcopy(layer).state_dict())
        other[0].eval()(torch.zeros(2, 3))
    before = resolve(comm).comm
    layer(data()[0])
    assert before is None
    assert resolve(comm).comm is not None


def test_a_communicator_freed_before_its_first_exchange_is_an_error() -> None:
    comm = WORLD.Dup()
    layer = SyncBatchNorm(3, process_group=comm)
    comm.Free()
    with pytest.raises(ValueError, match=rf"COMM_NULL \(on rank {RANK} of {SIZE}\): it was freed"):
        layer(data()[0])
    assert layer.num_batches_tracked == 0


def test_a_communicator_of_one_that_was_dropped() -> None:
    group = Communicator(Communicator(new_subgroups(SIZE)))
    gc.collect()
    new_subgroups(1)  # frees what all ranks have dropped
    assert exchange(group).shape == (3,)


def test_a_communicator_freed_after_its_first_exchange_is_needed_no_more() -> None:
    comm = WORLD.Dup()
    layer = SyncBatchNorm(3, momentum=1.0, process_group=comm)
    x, dy = data()
    layer(x)
    comm.Free()
    y = layer(x + 1)
    expected = oracle(x + 1, dy)
    assert distance(y, expected.y) < 1e-5


def test_free() -> None:
    comm = WORLD.Dup()
    group = resolve(comm)
    exchange(group)
    group.free()
    group.free()
    unused = Communicator()
    unused.free()
    subgroup = new_subgroups(1)
    subgroup.free()
    for freed in (group, unused, subgroup):
        with pytest.raises(MPISyncBNError, match=rf"was freed \(on rank {RANK} of {SIZE}\): make a new one"):
            exchange(freed)
        assert repr(freed).endswith(", freed)")
    assert exchange(comm).shape == (3,), "the user's own communicator is as it was"
    resolve(None).free()
    assert exchange(None).shape == (3,), "there is always a world"


def test_the_world_can_be_pickled_and_a_private_group_refuses() -> None:
    x, _ = data()
    for group in (None, WORLD, Communicator()):
        layer = pickle.loads(pickle.dumps(SyncBatchNorm(3, process_group=group)))
        assert layer(x).shape == x.shape
    for group in (new_subgroups(SIZE), WORLD.Dup()):
        with pytest.raises(
            TypeError, match=rf"cannot pickle Communicator\(rank={RANK}, .* Save the state_dict"
        ):
            pickle.dumps(SyncBatchNorm(3, process_group=group))


def test_pickles_of_the_world_name_the_same_function_in_all_versions() -> None:
    assert pickle.loads(b"cmpisyncbn.communicator\nresolve\n(NtR.") is resolve(None)
    assert b"cmpisyncbn.communicator\nresolve\n" in pickle.dumps(Communicator(), protocol=0)


def test_groups_that_overlap_are_used_in_turn() -> None:
    members = [range(SIZE), range(max(SIZE - 1, 1)), range(min(1, SIZE - 1), SIZE), [RANK]]
    groups = [None, *map(new_group, members[1:3]), MPI.COMM_SELF]
    mine = [(group, ranks) for group, ranks in zip(groups, members, strict=True) if RANK in ranks]
    means = [(exchange(group), np.mean(ranks)) for group, ranks in mine + mine]
    for mean, expected in means:
        assert mean == pytest.approx(np.full(3, expected))


def test_groups_may_differ_in_the_order_of_their_layers() -> None:
    group = WORLD.Split(HALF)
    layers = [SyncBatchNorm(3, momentum=1.0, process_group=group) for _ in range(3)]
    x, dy = data()
    for _ in range(2):
        for layer in layers if HALF % 2 else layers[::-1]:
            layer(x)
    expected = oracle(x, dy, comm=group)
    for layer in layers:
        assert distance(layer.running_mean, expected.mean) < 1e-5


def test_numpy_arrays_import_neither_torch_nor_cupy() -> None:
    out = run_alone(
        "import sys, numpy, mpisyncbn\n"
        "mpisyncbn.functional.batch_norm_forward(numpy.ones((2, 3)))\n"
        "print({'torch', 'cupy'} & set(sys.modules))"
    )
    assert out.strip() == "set()"


def test_one_call_at_a_time_where_mpi_wants_it(monkeypatch):
    """Below THREAD_MULTIPLE all groups share one lock; else each has its own."""
    free = Communicator(), Communicator()
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_SERIALIZED)
    serialized = Communicator(), Communicator()
    assert free[0].lock is not free[1].lock
    assert serialized[0].lock is serialized[1].lock
