"""Process groups of torch over MPI: rendezvous, layers in groups, and features that use groups."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mpisyncbn
from mpisyncbn import MPISyncBNError, distributed
from support.ranks import WORLD, error_of, several, together

RANK, SIZE = WORLD.rank, WORLD.size
pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch 2.13 renames collectives
]


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
    error = error_of(lambda: group.allreduce([x]), MPISyncBNError) if inside else None

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
        with pytest.raises(ValueError, match=r"initialized already, .*destroy_process_group"):
            mpisyncbn.init_process_group()
        with pytest.raises(TypeError, match="expected an mpi4py communicator"):
            mpisyncbn.init_process_group("world")


def test_features_of_torch_that_use_a_group(tmp_path: Any) -> None:
    """Functional and compiled collectives, meshes, DTensors and sharded checkpoints work."""
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


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch 2.6 gives it
def test_distributed_tensors_are_no_input_of_a_layer() -> None:
    """A distributed tensor is refused as input or weight.

    The result of a functional collective is accepted: the layer waits for its values.
    """
    sharded = distribute_tensor(torch.ones(2 * SIZE, 3), init_device_mesh("cpu", (SIZE,)), [Shard(0)])
    pending = functional_collectives.all_reduce(torch.ones(4, 3), "sum", dist.group.WORLD)
    layer = mpisyncbn.SyncBatchNorm(3)
    y, local = layer(pending), layer(sharded.to_local())
    words = rf"to be a plain tensor, got a DTensor \(on rank {RANK} of {SIZE}\): pass .*\.to_local\(\), or"
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
    """Return the rank and size that torch finds by default."""
    _, rank, size = next(dist.rendezvous("env://", **given))
    return rank, size


@pytest.mark.parametrize("names", SUBSETS, ids=lambda names: " ".join(names) or "none")
def test_variables_of_other_launchers(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """All four variables together are torchrun's, and count, because MPI does not know its ranks.

    If one of them is missing, rank and size are MPI's.
    """
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value if name in names else "")  # "" counts as unset, in torch too
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
    if SIZE == 1:  # WORLD_SIZE may count ranks that MPI does not know
        with pytest.raises(ValueError, match="as MPI counts"):
            rendezvous()
    with together():
        assert agreeing == (RANK, SIZE)
        assert len(errors) == 2
        assert addressed == (0, 1), "torch's own rendezvous"


@several
def test_init_with_some_ranks() -> None:
    half = WORLD.Split(RANK % 2)
    with together(), pytest.raises(ValueError, match=f"all {SIZE} ranks of the world"):
        mpisyncbn.init_process_group(half)
    half.Free()
