"""Training over MPI: DistributedDataParallel, sharding, ranks that run out of data."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import mpisyncbn
import mpisyncbn.distributed
from mpisyncbn import exchange, uneven
from support.ranks import WORLD, error_of, several, together, up_to_two
from support.versions import compiles, newer_than_2_6
from support.whole_batch import distance

RANK, SIZE = WORLD.rank, WORLD.size
STEPS = 20
pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch 2.13 renames options
]


def network(synchronized: bool = True, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).double()
    return mpisyncbn.convert_sync_batchnorm(net, **options) if synchronized else net


def batches(rank: int, step: int, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the samples of a rank for a step, and their labels. By default, rank r has r + 2."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    samples = rank + 2 if samples is None else samples
    x = torch.randn(samples, 2, 8, 8, generator=generator, dtype=torch.float64) + rank
    return x, torch.randint(5, (samples,), generator=generator)


def loss_of(net: nn.Module, x: Tensor, labels: Tensor, total: int) -> Tensor:
    return nn.functional.cross_entropy(net(x), labels, reduction="sum") / total


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def in_one_process(steps: int = STEPS, accumulate: int = 1, have: list[int] | None = None) -> nn.Module:
    """Train torch's own layers on the batches of all ranks together, and return the network.

    ``have`` is the number of batches that each rank has; by default one for each step.
    """
    net = network(synchronized=False)
    optimizer = optimizer_of(net)
    for step in range(steps):
        parts = [batches(rank, step) for rank in range(SIZE) if have is None or have[rank] > step]
        x, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        loss_of(net, x, labels, len(x)).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return net


def train(ddp: nn.Module, steps: int = STEPS, accumulate: int = 1) -> None:
    optimizer = optimizer_of(ddp)
    total = sum(rank + 2 for rank in range(SIZE))
    for step in range(steps):
        x, labels = batches(RANK, step)
        last = (step + 1) % accumulate == 0
        ddp.require_backward_grad_sync = last  # no_sync() sets this too
        # DistributedDataParallel takes the average over ranks, and the loss is a sum over them.
        (loss_of(ddp, x, labels, total) * SIZE).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(distance(a, b, 1.0) for a, b in pairs)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
    "own buffers": {"broadcast_buffers": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_one_process(name: str) -> None:
    net = network()
    train(DistributedDataParallel(net, **OPTIONS[name]))
    with together():
        assert largest_difference(net, in_one_process()) < 1e-9


def test_accumulated_gradients() -> None:
    net = network()
    train(DistributedDataParallel(net), accumulate=3)
    with together():
        assert largest_difference(net, in_one_process(accumulate=3)) < 1e-9


@pytest.mark.parametrize("hook", ["half", "PowerSGD"])
def test_compressed_gradients(hook: str) -> None:
    net = network()
    ddp = DistributedDataParallel(net)
    if hook == "half":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    else:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=4)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    train(ddp)
    parameters = torch.cat([parameter.detach().view(-1) for parameter in net.parameters()])
    everyones = WORLD.allgather(parameters)

    with together():
        assert all(torch.equal(each, everyones[0]) for each in everyones), "the same on every rank"
        assert all(each.isfinite().all() for each in everyones)
        if hook == "half":  # PowerSGD leads to other weights
            assert 0 < largest_difference(net, in_one_process()) < 0.1


def test_memory_efficient_layers() -> None:
    net = network(memory_efficient=True)
    train(DistributedDataParallel(net))
    with together():
        assert largest_difference(net, in_one_process()) < 1e-9


@newer_than_2_6("has no streams of a CPU, which fully_shard asks for")
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_sharded(memory_efficient: bool) -> None:
    net = network(memory_efficient=memory_efficient)
    layer = fully_shard(net[1])
    train(fully_shard(net))
    whole = [parameter.full_tensor() for parameter in net.parameters()]
    kinds = []
    for change in (mpisyncbn.revert_sync_batchnorm, mpisyncbn.convert_sync_batchnorm):
        change(net)
        layer.unshard()  # the class has kept the methods of FSDP
        layer.reshard()
        kinds.append(type(layer))
    net(batches(RANK, 0)[0])

    with together():
        assert [kind.__name__ for kind in kinds] == ["FSDPBatchNorm2d", "FSDPSyncBatchNorm"]
        assert kinds[0].__bases__ == (FSDPModule, nn.BatchNorm2d)
        assert issubclass(kinds[1], mpisyncbn.SyncBatchNorm)
        expected = in_one_process()
        for actual, parameter in zip(whole, expected.parameters(), strict=True):
            torch.testing.assert_close(actual, parameter, rtol=0, atol=1e-9)


def test_the_documented_example() -> None:
    """torch's own example of SyncBatchNorm works, with this package's layer and backend."""
    parts = [[rank for rank in range(SIZE) if rank % 2 == part] for part in range(min(SIZE, 2))]
    process_group = [dist.new_group(ranks) for ranks in parts][RANK % 2]
    network = nn.Sequential(nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(4 * 8, 2))
    layer = mpisyncbn.SyncBatchNorm(4, process_group=process_group)
    layer(torch.randn(3, 4, 2, 2, 2))
    sync_bn_network = mpisyncbn.SyncBatchNorm.convert_sync_batchnorm(network, process_group)
    ddp_sync_bn_network = DistributedDataParallel(sync_bn_network)
    ddp_sync_bn_network(torch.randn(3, 4, 2, 2, 2)).sum().backward()
    gradients = WORLD.allgather(network[2].weight.grad)

    with together():
        assert all(torch.equal(each, gradients[0]) for each in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_join(dtype: torch.dtype) -> None:
    """Ranks may have different numbers of batches, such as 5, 3 and 0.

    A rank without data answers the exchanges of the others until all have finished.
    """
    have = [5, 3, 0, 4][:SIZE]
    samples = [sum(rank + 2 for rank in range(SIZE) if have[rank] > step) for step in range(5)]
    net = network().to(dtype)
    ddp = DistributedDataParallel(net)
    optimizer = optimizer_of(ddp)
    with mpisyncbn.distributed.join(ddp):
        for step in range(have[RANK]):
            x, labels = batches(RANK, step)
            (loss_of(ddp, x.to(dtype), labels, samples[step]) * SIZE).backward()
            optimizer.step()
            optimizer.zero_grad()
    exchanges = WORLD.allgather(net[1].process_group.exchanges if net[1].process_group else 0)
    net.eval()
    after = net(batches(RANK, 99)[0].to(dtype))  # after the join, the layers work as before
    net.train()
    net(batches(RANK, 99)[0].to(dtype))

    with together():
        assert len(set(exchanges)) == 1
        expected = in_one_process(5, have=have).eval()(batches(RANK, 99)[0])
        tolerance = 1e-9 if dtype is torch.float64 else 1e-3
        torch.testing.assert_close(after.double(), expected, rtol=0, atol=tolerance)


def test_join_where_all_have_the_same() -> None:
    net = network()
    with mpisyncbn.distributed.join(ddp := DistributedDataParallel(net)):
        train(ddp)
    with together():
        assert largest_difference(net, in_one_process()) < 1e-9


def test_join_shares_running_statistics() -> None:
    """Each group has its own last rank. A frozen layer keeps its own. Rank r has r + 1 batches."""
    net = mpisyncbn.convert_sync_batchnorm(nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(3))))
    mpisyncbn.set_process_group(net[1], MPI.COMM_SELF)
    net[2].eval().running_mean.fill_(RANK)
    with mpisyncbn.distributed.join(ddp := DistributedDataParallel(net, broadcast_buffers=False)):
        for _ in range(RANK + 1):
            ddp(torch.randn(RANK + 2, 2)).sum().backward()
    means = WORLD.allgather(net[0].running_mean)
    with together():
        assert [int(layer.num_batches_tracked) for layer in net] == [SIZE, RANK + 1, 0]
        assert net[2].running_mean.tolist() == [RANK, RANK]
        assert all(torch.equal(mean, means[0]) for mean in means)


@several
def test_an_error_that_leaves_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has no data. It answers the layers of the others when they fail, and later."""
    group = dist.new_group()
    net = mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(2)), group)
    x, status = torch.ones(RANK + 2, 2), net[0].communicator.rank_status

    class Answering(uneven.ServingThread):
        def start(self) -> None:
            super().start()
            while status.current_call is None:  # it is in MPI then
                time.sleep(0.001)

    monkeypatch.setattr(uneven, "ServingThread", Answering)

    def steps() -> None:
        with mpisyncbn.distributed.join(DistributedDataParallel(net)):
            if RANK > 0:
                dist.all_reduce(torch.ones(5))  # rank 0 is in another collective, one of join's

    errors = [error_of(steps, mpisyncbn.CollectiveMismatchError)]
    waiting = status.current_call
    if RANK == 0:
        errors.append(error_of(lambda: net(x), mpisyncbn.MPISyncBNError))
    else:
        exchange.serve_joined(net[0].communicator)  # ends the wait
    dist.destroy_process_group(group)
    mpisyncbn.set_process_group(net, WORLD.Dup())
    net(x).sum().backward()
    with together():
        assert None not in errors
        assert waiting is None  # else the deadline would end the job
        if RANK == 0:
            assert "this group cannot be used since join failed (on rank 0 of" in str(errors[1])


@pytest.mark.parametrize("join", [mpisyncbn.distributed.join, DistributedDataParallel.join])
def test_join_that_divides_by_the_ranks_with_data(join: Any) -> None:
    """Gradients are divided by the number of ranks that still have data. Rank r has r + 1 batches.

    DistributedDataParallel's reducer, in C++, reads that number from a Work.
    """
    net = nn.Linear(2, 1, bias=False)
    seen = []
    with join(ddp := DistributedDataParallel(net), divide_by_initial_world_size=False):
        for _ in range(RANK + 1):
            net.zero_grad()
            ddp(torch.ones(1, 2)).sum().backward()
            seen.append(net.weight.grad.tolist())
    with together():
        assert seen == [[[1.0, 1.0]]] * (RANK + 1)


@several
def test_a_failed_reduction_is_an_error_of_backward() -> None:
    ddp = DistributedDataParallel(nn.Linear(3, 3))
    loss = ddp(torch.ones(2, 3)).sum()
    call = loss.backward if RANK == 0 else lambda: dist.all_reduce(torch.ones(5))
    error = error_of(call, RuntimeError)
    with together():
        assert "made different ones" in str(error)


@several
def test_join_that_ends_with_the_first() -> None:
    net = network()

    def steps() -> None:
        with mpisyncbn.distributed.join(ddp := DistributedDataParallel(net), throw_on_early_termination=True):
            for step in range(1 if RANK == 0 else 2):
                ddp(batches(RANK, step)[0]).sum().backward()

    error = error_of(steps, RuntimeError)
    net(batches(RANK, 9)[0])  # the layers still exchange
    with together():
        assert error is not None


# Tests of torch.compile. They ignore torch's warnings.
warns = pytest.mark.filterwarnings("ignore")
slow = pytest.mark.full("torch's compiler takes its time")
BACKEND = "aot_eager"
KINDS = "plain", "static graph", "unused parameters", "inside", "whole graph"


@warns
@compiles
@up_to_two
@pytest.mark.parametrize("name", [KINDS[0], *(pytest.param(each, marks=slow) for each in KINDS[1:])])
def test_compiled(name: str, fresh_compiler: None) -> None:
    """A compiled model trains like one process.

    DistributedDataParallel rebuilds its buckets in the second of the four steps.
    """
    net = network()
    if name == "inside":
        ddp: Any = DistributedDataParallel(torch.compile(net, backend=BACKEND))
    else:
        ddp = torch.compile(DistributedDataParallel(net, **OPTIONS.get(name, {})), backend=BACKEND)
    with torch._dynamo.config.patch(optimize_ddp=name != "whole graph"):
        train(ddp, steps=4)
    with together():
        assert largest_difference(net, in_one_process(steps=4)) < 1e-9


@warns
@up_to_two
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_collectives(whole: bool, fresh_compiler: None) -> None:
    """Compiled collectives give the same results as gloo's.

    Those that torch has graph operations for compile into one graph. With graph breaks, all work.
    """

    def traceable(x: Tensor, group: Any) -> list[Tensor]:
        total, everyone, part = x * 2, x.new_zeros(2 * SIZE, 3), x.new_zeros(2, 3)
        dist.all_reduce(total, group=group)
        dist.all_gather_into_tensor(everyone, x, group=group)
        dist.reduce_scatter_tensor(part, everyone + total.sum(), group=group)
        return [total, everyone, part, functional_collectives.all_reduce(x + 1, "max", group)]

    def anything(x: Tensor, group: Any) -> list[Tensor]:
        total, sent, parts = x * 2, x + 1, [torch.zeros_like(x) for _ in range(SIZE)]
        works = [
            dist.all_reduce(total, group=group, async_op=True),
            dist.all_gather(parts, x, group=group, async_op=True),
        ]
        for work in works:
            work.wait()
        dist.broadcast(sent, SIZE - 1, group=group)
        dist.barrier(group=group)
        return [total, sent, *parts]

    gloo, x = (
        dist.new_group(backend="gloo"),
        batches(RANK, 1, 2)[0][:, 0, 0, :3].mul(10).round(),
    )  # whole numbers: their sums are exact in any order
    compiled = torch.compile(traceable if whole else anything, backend=BACKEND, fullgraph=whole)
    expected, got = compiled(x, gloo), compiled(x, dist.group.WORLD)
    with together():
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@warns
@up_to_two
def test_monitored_barrier_in_a_compiled_function(fresh_compiler: None) -> None:
    @torch.compile(backend=BACKEND)
    def function(x: Tensor) -> Tensor:
        mpisyncbn.distributed.monitored_barrier()
        return x + 1

    y = function(torch.ones(2))
    with together():
        assert torch.equal(y, torch.full((2,), 2.0))
