"""What the other tests leave: lines that they do not run, and changes to the code that they do not notice."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn

import mpisyncbn
from mpisyncbn import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    Communicator,
    MPISyncBNError,
    SyncBatchNorm,
    buffers,
    distributed,
    exchange,
    functional,
)
from mpisyncbn.communicator import by_handle, resolve
from mpisyncbn.diagnostics import Call, fingerprint
from mpisyncbn.functional import BatchStats, update_running_stats
from mpisyncbn.progress import Work
from support.oracle import distance, local_batch, oracle, shard
from support.ranks import WORLD, together

CALL = Call("a layer", "forward", 3, "float32")
WIDE = CALL._replace(dtype="float64")
LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("wide", [False, True])
def test_the_mean_of_one_value_is_that_value(group, wide):
    """It is refused for a whole batch, and is what one with data on a single rank may be merged from."""
    count = int(WORLD.rank == WORLD.size - 1)
    mean = np.full(3, 2.5 * count)
    total, merged, var = exchange.merge_moments(
        group,
        WIDE if wide else CALL,
        count,
        np.stack((mean * 0.75, mean * 0.25)) if wide else mean,
        np.zeros(3),
    )
    assert total == 1
    assert merged.tolist() == [2.5] * 3
    assert var.tolist() == [0.0] * 3


def test_float64_where_the_first_rank_has_no_data():
    """Distances are those from a rank with data, or the digits of a large mean are lost."""
    n = 0 if WORLD.rank == 0 and WORLD.size > 2 else 5
    x = np.random.default_rng(WORLD.rank).normal(1e8, 1.0, (n, 3))
    mean = x.mean(axis=0) if n else np.zeros(3)
    rest = (x - mean).mean(axis=0) if n else np.zeros(3)
    m2 = ((x - mean - rest) ** 2).sum(axis=0)
    _, merged, var = exchange.merge_moments(resolve(None), WIDE, n, np.stack((mean, rest)), m2)
    whole = np.concatenate(WORLD.allgather(x)).astype(np.longdouble)
    with together():
        assert np.abs(var / whole.var(axis=0) - 1).max() < 1e-12
        assert np.abs(merged - whole.mean(axis=0)).max() < 2e-8


def test_float64_of_single_values_that_differ_in_their_last_bits():
    """One value is data too: their mean is no float64, and their variance that of the small differences."""
    n = int(WORLD.rank > 0 or WORLD.size == 1)
    small = 2.0 * np.arange(min(1, WORLD.size - 1), WORLD.size) ** 2
    mean = np.full(3, 2.0**53 + 2 * WORLD.rank**2) * n
    _, merged, var = exchange.merge_moments(resolve(None), WIDE, n, np.stack((mean, mean * 0)), np.zeros(3))
    assert np.allclose(var, small.var(), rtol=1e-14, atol=0)
    assert np.abs(merged - 2.0**53 - small.mean()).max() <= 2


def test_no_exchange_is_seen_after_it(group):
    """Whatever became of it: the watchdog would wait for its end."""
    ones = np.ones(3)
    exchange.merge_moments(group, CALL, 1, ones, ones)
    seen = [group.presence.doing]
    exchange.reduce_sums(group, CALL, ones, ones)
    seen.append(group.presence.doing)
    exchange.merge_moments(group, WIDE, 1, np.ones((2, 3)), ones)
    seen.append(group.presence.doing)
    exchange.answer(group)  # all ranks are through
    seen.append(group.presence.doing)
    assert seen == [None] * 4
    assert group.presence.exchanges == 4


def test_a_constant_channel_has_no_variance_at_all(group):
    """Of its sums rounding is left, of either sign."""
    mean = np.random.default_rng(0).normal(size=1000)
    count = 7 + 2 * WORLD.rank
    _, merged, var = exchange.merge_moments(group, CALL, count, mean, np.zeros(1000))
    assert np.allclose(merged, mean, rtol=1e-14)
    assert not var.any()


def test_no_spread_is_taken_for_rounding(group):
    """However little it is against the mean."""
    count = int(WORLD.rank == 0)
    m2 = np.array([1e-8, 1e-15, 1e-30, 0.0]) * count
    _, _, var = exchange.merge_moments(group, CALL, count, np.full(4, 1.5) * count, m2)
    assert var.tolist() == [1e-8, 1e-15, 1e-30, 0.0]


@pytest.mark.skipif(WORLD.size < 2, reason="one rank cannot disagree with itself")
def test_layers_are_named_anew_after_a_mismatch(monkeypatch):
    """On some ranks a name stands for another layer then, and what follows would be a mismatch again."""
    monkeypatch.setenv("MPISYNCBN_DEBUG", "1")
    group = Communicator()
    layers = [SyncBatchNorm(channels, process_group=group) for channels in (3, 4)]
    inputs = [shard((2 + WORLD.rank, channels)) for channels in (3, 4)]
    odd, error = int(WORLD.rank == 0), None
    try:
        layers[odd](inputs[odd])
    except CollectiveMismatchError as caught:
        error = caught
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    group.free()
    assert "the layer first used in exchange number 1 (4 channels, float32)" in str(error)


def test_no_two_exchanges_look_alike_for_a_long_time():
    assert len({fingerprint(CALL, number) for number in range(2**18)}) == 2**18


def test_stats_of_another_number_of_channels():
    x = np.ones((4, 3))
    _, stats = functional.batch_norm_forward(x)
    short = BatchStats._make((*(vector[:2] for vector in stats[:3]), stats.count))
    with pytest.raises(ValueError, match=r"expected stats.mean of 3 channels, got shape \(2,\)"):
        functional.batch_norm_backward(x, x, short)


def test_nothing_is_recorded_and_no_value_is_warned_of():
    x = shard((3 + WORLD.rank, 3, 2)).requires_grad_()
    y, stats = functional.batch_norm_forward(x)
    dx, dweight, dbias = functional.batch_norm_backward(y, x, stats)
    recorded = [result.requires_grad for result in (y, *stats[:3], dx, dweight, dbias)]
    infinite = np.full((2, 3), np.inf)
    for bad in (infinite, torch.from_numpy(infinite)):  # a warning would be an error
        _, stats = functional.batch_norm_forward(bad)
        functional.batch_norm_backward(bad, bad, stats)
    assert recorded == [False] * 7


# A momentum that is not quite a float goes past native code; a count that is a tensor is not looked at.
HALVES = {"native": (0.5, 2), "plain": (np.float64(0.5), 2), "unseen": (0.5, torch.tensor(2))}


def stats_of(mean: float, var: float, count: object) -> BatchStats:
    vectors = torch.tensor([mean, -mean]).double(), torch.tensor([var, var]).double()
    return BatchStats(
        *(vectors if isinstance(count, torch.Tensor) else (v.numpy() for v in vectors)), None, count
    )


@pytest.mark.parametrize("way", HALVES)
def test_the_variance_of_two_values_is_twice_the_biased_one(way):
    momentum, count = HALVES[way]
    running = torch.zeros(2), torch.ones(2)
    assert update_running_stats(*running, stats_of(3.0, 4.0, count), momentum)
    assert running[0].tolist() == [1.5, -1.5]
    assert running[1].tolist() == [4.5, 4.5]


@pytest.mark.parametrize("way", HALVES)
def test_what_just_fits_enters_the_running_statistics(way):
    momentum, count = HALVES[way]
    for mean, var in ((LARGEST, 1.0), (0.0, LARGEST / 2)):
        running = torch.zeros(2), torch.zeros(2)
        assert update_running_stats(*running, stats_of(mean, var, count), momentum)
        assert running[0].tolist() == [mean / 2, -mean / 2]
        assert running[1].tolist() == [var, var]


@pytest.mark.parametrize(
    ("mean", "var", "count"), [(1.0, 1.0, 0), (np.inf, 1.0, 2), (1.0, np.inf, 2), (1.0, LARGEST, 2)]
)
def test_what_no_host_has_seen_enters_whole_or_not_at_all(mean, var, count):
    running, batches = (torch.zeros(2), torch.ones(2)), torch.tensor(7)
    stats = stats_of(mean, var, torch.tensor(count))
    refused = functional.enter_batch(*running, batches, stats, 0.5)
    kept = [*running[0].tolist(), *running[1].tolist(), batches.item()]
    entered = functional.enter_batch(*running, batches, stats_of(2.0, 3.0, torch.tensor(1)), 0.5)
    assert not refused
    assert kept == [0, 0, 1, 1, 7]
    assert entered
    assert [*running[0].tolist(), *running[1].tolist(), batches.item()] == [1, -1, 2, 2, 8]


def test_arguments_of_no_kind_that_anybody_takes():
    x, sparse = torch.ones(4, 3), torch.eye(2).to_sparse()
    for words, call in {
        "expected input to be an array, got list": lambda: functional.batch_norm_forward([[1.0]]),
        "expected input to be an array, got memoryview": lambda: functional.batch_norm_forward(
            memoryview(b"")
        ),
        "expected eps to be finite and at least 0, got str": lambda: functional.batch_norm_forward(
            x, eps="1"
        ),
        "expected momentum to be a number, got None": lambda: mpisyncbn.sync_batch_norm(
            x, None, None, momentum=None
        ),
        "as the reduction, got another": lambda: buffers.name_of("SUM of squares"),
        "expected a tensor, got list": lambda: buffers.staged([1.0]),
        "expected a dense tensor, got one of layout torch.sparse_coo": lambda: buffers.staged(sparse),
    }.items():
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(MPISyncBNError, match="the Communicator of a compiled graph is gone"):
        by_handle("of nobody")


def test_a_model_goes_over_to_another_group():
    model = mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)))
    x = shard((local_batch(), 3))
    whole = model[0](x)
    mpisyncbn.set_process_group(model, MPI.COMM_SELF)
    alone = model[0](x)
    mpisyncbn.set_process_group(model, None)
    again = model[0](x)
    expected, own = oracle(x, x), oracle(x, x, comm=MPI.COMM_SELF)
    assert distance(whole, expected.y) < 1e-5
    assert distance(alone, own.y) < 1e-5
    assert torch.equal(whole, again)
    assert model[2].process_group is model[0].process_group


def test_a_collective_that_was_begun():
    work = Work("the result", "all_reduce of something")
    with pytest.raises(CollectiveTimeoutError, match="all_reduce of something took longer than"):
        work.wait(timedelta(seconds=0.01))
    future, seen = work.get_future(), []
    assert work.get_future() is future
    assert not work.is_success()
    work.finish()
    work.synchronize()
    future.add_done_callback(lambda done: seen.append(done.value()))
    assert [*seen, work.result()] == ["the result"] * 2
    failed = Work(None, "all_reduce of something")
    future = failed.get_future()
    failed.finish(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        future.wait()
    assert not failed.is_success()


@pytest.fixture
def torch_group():
    mpisyncbn.init_process_group(timeout=timedelta(seconds=60))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch 2.13 renames collectives
def test_what_a_group_of_torch_refuses(torch_group):
    x = torch.ones(3)
    sent, received = torch_group.send([x], WORLD.rank, 5), torch_group.recv([torch.zeros(3)], WORLD.rank, 5)
    with pytest.raises(NotImplementedError, match=r"recv from rank .* have no future"):
        received.get_future()
    received.wait()
    sent.wait()
    with pytest.raises(
        ValueError, match=f"send: expected a rank from 0 to {WORLD.size - 1}, got {WORLD.size}"
    ):
        torch_group.send([x], WORLD.size, 0)
    with pytest.raises(ValueError, match="expected the dtypes of output and input to be alike"):
        dist.reduce_scatter_tensor(x[:1].double(), torch.ones(WORLD.size))
    with pytest.raises(TypeError, match="expected a group of backend mpi4py, got 'another'"):
        distributed.monitored_barrier("another")
    dist.all_reduce(x)  # the group lives on
    assert x.tolist() == [WORLD.size] * 3


def test_a_timeout_that_is_a_number_and_a_model_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"expected timeout to be a datetime.timedelta, got int"):
        distributed.ProcessGroup(MPI.COMM_SELF, 60)
    group = distributed.ProcessGroup(MPI.COMM_SELF.Dup(), timedelta(seconds=60))
    with pytest.raises(TypeError, match=r"expected timeout to be a datetime.timedelta, got int"):
        distributed.monitored_barrier(group, 60)
    group.shutdown()
    with (
        pytest.raises(TypeError, match="expected a DistributedDataParallel, got Linear"),
        distributed.join(nn.Linear(1, 1)),
    ):
        pass


def test_what_is_sent_may_lie_where_something_is_received(torch_group) -> None:
    """As shards do that FSDP gathers in place. MPI forbids it: MPICH says so, others may send what came."""
    size, rank = WORLD.size, WORLD.rank
    gathered, scattered, swapped = torch.zeros(3 * size), torch.ones(3 * size) * rank, torch.zeros(size)
    mine = gathered[3 * rank : 3 * (rank + 1)]
    mine += rank
    torch_group.all_gather_single(gathered, mine).wait()
    part = scattered[:3]
    torch_group.reduce_scatter_single(part, scattered).wait()
    swapped += torch.arange(size) + size * rank
    torch_group.all_to_all_single(swapped, swapped).wait()
    with together():
        assert gathered.tolist() == [r for r in range(size) for _ in range(3)]
        assert part.tolist() == [sum(range(size))] * 3
        assert swapped.tolist() == [rank + size * r for r in range(size)]
