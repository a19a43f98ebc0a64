"""Values and order of exchanges under the stream transport, on a stand-in for CUDA's driver."""

from __future__ import annotations

import contextlib
import shutil
import weakref

import numpy as np
import pytest

from mpisyncbn import MPISyncBNError, enqueue, exchange, uneven
from mpisyncbn.batch_stats import invstd_of
from mpisyncbn.comm.communicator import Communicator
from mpisyncbn.fingerprint import LayerCall
from mpisyncbn.kernels import native
from support.device import GPU
from support.ranks import WORLD
from support.stream_device import library, needs_standin, pretend_stream, stream_group

pytestmark = [needs_standin, pytest.mark.skipif(GPU, reason="scripts/gpu_check has its own")]
C = 5
FLOAT32 = float(np.finfo("f").max)


@pytest.fixture
def device(monkeypatch):
    return pretend_stream(monkeypatch)


@pytest.fixture
def group(device):
    made = stream_group()
    yield made
    made.free()


def call(dtype="float32", direction="forward", channels=C, eps=1e-3):
    return LayerCall("a layer", direction, channels, dtype, eps)


def normal(seed=0, mean=0.0, rows=None):
    generator = np.random.default_rng([seed, WORLD.rank])
    return generator.normal(mean, 1, (3 + 2 * WORLD.rank if rows is None else rows, C))


def large_mean():
    """Return values whose variance float64 sums lose, so that a second message is needed."""
    return normal(1, 1e6 * np.array([1, 0, -1, 100, 0]))


def constant_channels():
    return normal(2) * [1, 0, 0, 1, 0] + [0, 3, 1e6, 0, 0]


def an_empty_rank():
    return normal(3, rows=0 if WORLD.rank == WORLD.size - 1 and WORLD.size > 1 else None)


def absorbed():
    """Return constants, except on rank 0, whose variance is lost beside its squared mean."""
    return np.full((6, C), 1e6) + (WORLD.rank == 0) * 0.0625 * (np.arange(6) % 2)[:, None]


def not_finite():
    return normal(4) * [1, np.inf, np.nan, 1, 1]


def moments(x):
    mean = x.mean(0) if len(x) else np.zeros(C)
    return len(x), mean, ((x - mean) ** 2).sum(0)


BATCHES = [normal, large_mean, constant_channels, an_empty_rank, absorbed, not_finite]


def enqueued(group, device, what, count, vectors, total=None, length=None):
    """Enqueue an exchange. Return the device memory of its result. Collective."""
    worker = enqueue.worker_for(group, vectors[0])
    out = device.memory(length or 3 * C + 3)
    addresses = [each.data_ptr() for each in vectors]
    with enqueue.locked(group, "an exchange"):
        worker.enqueue(
            device.device_and_stream(), what, count, total, None, addresses, out.data_ptr(), None, ()
        )
    return out


def sums_of(group, call_, *vectors):
    """Return the sums over the same group by the host transport. Collective."""
    return exchange.reduce_sums(group, call_, *vectors)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch", BATCHES, ids=lambda each: each.__name__)
def test_moments_have_the_bits_of_the_host_transport(batch, dtype, group, device):
    x = batch()
    with np.errstate(all="ignore"):
        count, mean, m2 = native().local_moments(x) if dtype == "float64" else moments(x)
        expected = exchange.merge_moments(group, call(dtype), count, mean, m2)
    before, total = group.exchanges, enqueue.new_total()
    what = enqueue.moments_call(group, call(dtype), C, 100.0)
    vectors = [device.put(each) for each in (*np.atleast_2d(mean), m2)]
    out = enqueued(group, device, what, count, vectors, total)
    device.synchronize()
    messages = group.exchanges - before
    all_of = np.concatenate(WORLD.allgather(x.astype("d")))
    found, (n, to_unbiased, fits) = out[:-3].numpy().reshape(3, C), out[-3:].tolist()
    assert n == total.count == len(all_of)
    assert found[:2].tobytes() == np.stack(expected[1:]).tobytes()
    assert found[2].tobytes() == invstd_of(expected[2], 1e-3).tobytes()
    assert to_unbiased == n / (n - 1)
    with np.errstate(all="ignore"):
        unbiased = all_of.var(0, ddof=1)
        assert fits == bool((abs(all_of.mean(0)) <= 100).all() and (unbiased <= 100).all())
        scale = 1 + abs(all_of.mean(0))
        np.testing.assert_allclose(found[0] / scale, all_of.mean(0) / scale, rtol=0, atol=1e-14)
    if batch is not not_finite:
        close = 1e-9 if dtype == "float32" or batch is absorbed else 1e-12
        np.testing.assert_allclose(
            found[1], all_of.var(0), rtol=1e-6 if batch is large_mean else close, atol=1e-12
        )
    assert messages == (2 if dtype == "float32" and batch in (large_mean, absorbed) else 1)


@pytest.mark.parametrize("largest", [65504.0, FLOAT32])
def test_the_result_says_whether_running_statistics_can_hold_it(largest, group, device):
    """The flag is 1 if the dtype can hold the batch. An empty batch gives 0, moments of 0."""
    what = enqueue.moments_call(group, call("float64"), C, largest)

    def flag(count, mean, var):
        vectors = [device.put(np.full(C, each)) for each in (mean, 0.0, var * count)]
        out = enqueued(group, device, what, count, vectors)
        device.synchronize()
        return out[-1].item(), out[:C].tolist(), out[C : 2 * C].tolist()

    below, above = largest * (1 - 1e-9), largest * (1 + 1e-9)
    flags = [flag(4, mean, var)[0] for mean, var in ((below, 1), (above, 1), (1, below / 2), (1, above))]
    empty = flag(0, 0.0, 0.0)
    assert flags == [1, 0, 1, 0]
    assert empty == (0, [0] * C, [0] * C)


@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_sums_have_the_bits_of_the_host_transport(vectors, group, device):
    mine = [normal(each, rows=1)[0] for each in range(vectors)]
    backward = call(direction="backward")
    expected = sums_of(group, backward, *mine)
    found = exchange.reduce_sums(group, backward, *map(device.put, mine))
    apart = exchange.reduce_sums(group, backward, *device.put(np.stack(mine)))
    device.synchronize()
    for each in (found, apart):
        assert [row.numpy().tobytes() for row in each] == [row.tobytes() for row in expected]


@pytest.mark.parametrize("captured", [False, True])
def test_a_backward_divides_by_the_count_of_its_forward(captured, group, device):
    """The backward divides by its forward's count, even if one graph has captured both."""
    total, mine = enqueue.new_total(), normal(rows=2)
    count, mean, m2 = native().local_moments(normal())
    moments_of, sums_of_all = [device.put(each) for each in (*mean, m2)], [device.put(mine)]
    forward = enqueue.moments_call(group, call("float64"), C)
    backward = enqueue.sums_call(group, call(direction="backward"), 2 * C)
    with device.driver.capture(device.stream) if captured else contextlib.nullcontext() as graph:
        enqueued(group, device, forward, count, moments_of, total)
        out = enqueued(group, device, backward, 0, sums_of_all, total, 2 * C)
    for _ in range(2 * captured):
        device.driver.cuGraphLaunch(graph[0], device.stream)
    device.synchronize()
    if captured:
        device.driver.cuGraphExecDestroy(graph[0])
    expected = np.concatenate(sums_of(group, call(direction="backward"), *mine)) / total.count
    assert total.count == WORLD.allreduce(count)
    assert out.numpy().tobytes() == expected.tobytes()


def numbered(group, device, number):
    """Enqueue a sum that shows its number. The message is copied in the stream's order."""
    sums = device.memory(1)
    device.copy(sums, device.put([number * (WORLD.rank + 1)]))
    (found,) = exchange.reduce_sums(group, call(direction="backward", channels=1), sums)
    return found


def rank_sum(number):
    return number * WORLD.size * (WORLD.size + 1) / 2


def test_the_host_runs_ahead(group, device, monkeypatch):
    """The host enqueues 300 exchanges, the worker has 256 slots. The host ends first."""
    monkeypatch.setenv("MPISYNCBN_STANDIN_PAUSE", "0")
    found = [numbered(group, device, number) for number in range(300)]
    ahead = group.stream.pending
    group.synchronize()
    device.synchronize()
    assert [each.item() for each in found] == [rank_sum(number) for number in range(300)]
    assert 0 < ahead <= 256
    assert group.stream.slots == 256
    assert (group.exchanges, group.stream.pending) == (300, 0)
    # this message is larger than any slot
    ones = device.put([1.0] * 1000)
    (total,) = exchange.reduce_sums(group, LayerCall("large", "backward", 1000, "float32"), ones)
    group.synchronize()
    device.synchronize()
    assert group.stream.slots == 256
    assert (total == WORLD.size).all()


def test_pinned_memory_serves_the_next_group(monkeypatch, tmp_path):
    """A freed group's pinned memory serves the next group, except that of the last exchange.

    The device may still copy a result from there.
    """
    device = pretend_stream(monkeypatch, path=shutil.copy(library(), tmp_path / "driver.so"))
    slots = []
    for _ in range(5):
        group = stream_group()
        found = [numbered(group, device, number) for number in range(20)]
        group.synchronize()
        slots.append(group.stream.slots)
        group.free()
        device.synchronize()
        assert [each.item() for each in found] == [rank_sum(number) for number in range(20)]
    assert min(slots) > 1
    assert device.driver.mailboxes() <= max(slots) + len(slots)


def test_two_streams_in_turn(group, device):
    """Exchanges keep their order, even if the stream of the last one is synchronized first."""
    other, found = device.driver.stream(), []
    for number in range(20):
        with device.on(other) if number % 3 == 0 else contextlib.nullcontext():
            found.append(numbered(group, device, number))
    device.synchronize()
    device.driver.cuStreamSynchronize(other)
    assert [each.item() for each in found] == [rank_sum(number) for number in range(20)]


def test_two_communicators_in_another_order_on_every_second_rank(monkeypatch, tmp_path):
    """Exchanges of two communicators on two streams do not wait for each other."""
    monkeypatch.setenv("MPISYNCBN_STANDIN_ORDER", "early")
    driver = tmp_path / "early.so"
    shutil.copy(library(), driver)
    device = pretend_stream(monkeypatch, path=driver)
    groups = [stream_group(), stream_group()]
    streams = [device.stream, device.driver.stream()]
    found = [[], []]
    for number in range(10):
        for which in (0, 1) if WORLD.rank % 2 else (1, 0):
            with device.on(streams[which]):
                found[which].append(numbered(groups[which], device, 100 * which + number))
    for stream in streams:
        device.driver.cuStreamSynchronize(stream)
    values = [each.item() for each in found[0] + found[1]]
    for each in groups:
        each.free()
    assert values == [rank_sum(number) for number in (*range(10), *range(100, 110))]


def host_tensors(group, device):
    ones = np.ones(1)
    assert sums_of(group, call(direction="backward", channels=1), ones)[0] == WORLD.size


def collective(group, device):
    with group.collective("a barrier"):
        group.comm.Barrier()


def debug_mode(group, device):
    group.debug = True
    numbered(group, device, 7)
    group.debug = False


def new_group(group, device):
    inner = Communicator(group)
    found = numbered(inner, device, 3)
    inner.free()
    assert found.item() == rank_sum(3)


def join_context(group, device):
    group.in_join_context = True
    total = exchange.reduce_sums(group, call(direction="backward"), device.put(np.ones(C)))[0]
    exchange.serve_joined(group)
    group.in_join_context = False
    assert total.tolist() == [WORLD.size] * C


def test_the_stream_of_the_last_exchange_lives(group, device, monkeypatch):
    """CuPy destroys a stream that nobody holds. The next exchange may have to wait for it."""
    made = []

    class Stream:
        def __init__(self):
            made.append(weakref.ref(self))

    monkeypatch.setattr(device, "current_stream", Stream)
    for _ in range(3):
        exchange.reduce_sums(group, call(direction="backward"), device.put(np.ones(C)))
    alive = [each() is not None for each in made]
    device.driver.cuStreamSynchronize(device.stream)
    assert alive == [False, False, True]


@pytest.mark.parametrize(
    "between", [host_tensors, collective, debug_mode, new_group, join_context], ids=lambda each: each.__name__
)
def test_the_host_exchanges_between_enqueued_ones(between, group, device):
    """The host waits for enqueued exchanges before its own: MPI's calls have one order."""
    found = []
    for number in range(4):
        found += [numbered(group, device, 2 * number), numbered(group, device, 2 * number + 1)]
        between(group, device)
        assert group.stream.pending == 0
    device.synchronize()
    assert [each.item() for each in found] == [rank_sum(number) for number in range(8)]
    assert len(set(WORLD.allgather(group.exchanges))) == 1


def graph_of(group, device, numbers):
    """Return a graph of exchanges, its messages and its results. Replays are collective."""
    messages, found = device.put(np.zeros(numbers)), []
    with device.driver.capture(device.stream) as graph:
        for number in range(numbers):
            message = messages[number : number + 1]
            found += exchange.reduce_sums(group, call(direction="backward", channels=1), message)
    return graph[0], messages, found


def test_a_captured_graph_is_replayed(group, device):
    """A graph owns its slots until it is destroyed, and each replay counts its exchanges."""
    numbered(group, device, 0)
    graph, messages, found = graph_of(group, device, 3)
    device.synchronize()
    owned, before, seen = group.stream.owned, group.exchanges, []
    for replay in range(100):
        for number in range(3):
            messages[number] = (replay + 10 * number) * (WORLD.rank + 1)
        device.driver.cuGraphLaunch(graph, device.stream)
        eager = numbered(group, device, replay) if replay % 10 == 0 else None
        device.synchronize()
        seen.append([each.item() for each in found])
        if eager is not None:
            seen[-1].append(eager.item())
    counted = group.exchanges - before
    slots = [group.stream.slots]
    device.driver.cuGraphExecDestroy(graph)
    again, *_ = graph_of(group, device, 3)
    slots.append(group.stream.slots)
    device.driver.cuGraphExecDestroy(again)
    expected = [
        [rank_sum(replay + 10 * number) for number in (0, 1, 2, 0)[: 3 + (replay % 10 == 0)]]
        for replay in range(100)
    ]
    assert seen == expected
    assert (owned, counted, group.stream.owned) == (3, 310, 0)
    assert slots[0] == slots[1]  # the second graph reuses the slots of the first


def test_replays_inside_join_are_refused(group, device):
    """Ranks without data serve no replay. One from before is done when the context begins."""
    graph, messages, found = graph_of(group, device, 2)

    def replay(number):
        messages[:] = number * (WORLD.rank + 1.0)
        device.driver.cuGraphLaunch(graph, device.stream)

    replay(1)
    values, said = [], []
    with uneven.announcing([group]):
        values += [each.item() for each in found]
        for number in (2, 3):
            replay(number)
            try:
                group.synchronize()
            except MPISyncBNError as error:
                said.append(str(error))
            device.synchronize()
            values += [each.item() for each in found]
    replay(4)
    group.synchronize()
    values += [each.item() for each in found]
    device.driver.cuGraphExecDestroy(graph)
    assert values[:2] + values[6:] == [rank_sum(1)] * 2 + [rank_sum(4)] * 2
    assert np.isnan(values[2:6]).all()
    assert len(said) == 2
    assert all("expected no replay of a captured graph inside join" in each for each in said)


def test_synchronize_waits_for_replays(group, device):
    """synchronize() waits for replays on any stream: host and worker take turns in MPI."""
    graph, messages, found = graph_of(group, device, 2)
    messages[:] = 3.0 * (WORLD.rank + 1)
    device.driver.cuGraphLaunch(graph, device.driver.stream())
    group.synchronize()
    values = [each.item() for each in found]
    device.driver.cuGraphExecDestroy(graph)
    assert values == [rank_sum(3)] * 2


def test_a_freed_group_has_finished(device):
    group = stream_group()
    found = [numbered(group, device, number) for number in range(20)]
    group.free()
    device.synchronize()
    assert [each.item() for each in found] == [rank_sum(number) for number in range(20)]


def test_a_graph_outlives_its_group(device):
    """Exchanges of a graph whose group was freed give NaN, without calls of MPI."""
    group = stream_group()
    numbered(group, device, 1)
    graph, _, found = graph_of(group, device, 2)
    device.driver.cuGraphLaunch(graph, device.stream)
    device.synchronize()
    before = [each.item() for each in found]
    group.free()
    device.driver.cuGraphLaunch(graph, device.stream)
    device.synchronize()
    after = [each.item() for each in found]
    device.driver.cuGraphExecDestroy(graph)
    assert before == [0, 0]
    assert np.isnan(after).all()
