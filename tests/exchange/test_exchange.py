"""The messages of exchanges, and their results."""

from __future__ import annotations

import ctypes
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpisyncbn import exchange, kernels
from mpisyncbn.comm import transport
from mpisyncbn.comm.communicator import Communicator
from mpisyncbn.comm.groups import resolve
from mpisyncbn.errors import CollectiveMismatchError
from mpisyncbn.fingerprint import LayerCall, fingerprint
from support.device import GPU, pretend
from support.ranks import WORLD, error_of, together
from support.recorder import Recorder

needs_native = pytest.mark.skipif(kernels.native() is None, reason="the native kernels were not built")
ALLREDUCE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, *[ctypes.c_void_p] * 3
)
CALL = LayerCall("a layer", "forward", 3, "float32")
WIDE = CALL._replace(dtype="float64")


def test_the_messages(recorded):
    """One collective sends the fingerprint, then exactly the values in the table of exchange.py."""
    group = recorded.group
    mean, m2 = np.array([1.0, 2.0, -3.0]) + WORLD.rank, np.array([4.0, 5.0, 6.0])
    exchange.merge_moments(group, CALL, 7, mean, m2)
    exchange.merge_moments(group, WIDE, 7, np.stack((mean, mean * 0)), m2)
    exchange.reduce_sums(group, CALL._replace(direction="backward"), mean, m2)
    calls = CALL, WIDE, CALL._replace(direction="backward")
    signatures = [fingerprint(call, i) for i, call in enumerate(calls, 1)]
    bodies = [[7, *(7 * mean), *(m2 + 7 * mean**2)], [7, *mean, 0, 0, 0, *m2], [0, *mean, *m2]]
    assert [name for name, _ in recorded.messages] == ["Allreduce", "Allgather", "Allreduce"]
    for (_, message), h, body in zip(recorded.messages, signatures, bodies, strict=True):
        assert message.dtype == np.float64
        assert message.tolist() == [h, h * h, *body]


def test_a_rank_without_data_sends_as_much(recorded):
    n = 4 if WORLD.rank == 0 else 0
    for call, mean in ((CALL, np.ones(3)), (WIDE, np.ones((2, 3)))):
        exchange.merge_moments(recorded.group, call, n, mean * (n > 0), np.ones(3) * (n > 0))
    assert [len(m) for _, m in recorded.messages] == [2 * 3 + 3, 3 * 3 + 3]


def whole_batch(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    everything = np.concatenate(values).astype(np.longdouble)
    return everything.mean(axis=0), everything.var(axis=0)


@given(
    counts=st.lists(st.integers(0, 6), min_size=4, max_size=4).filter(lambda c: c[0] > 1),
    ratio=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    seed=st.integers(0, 100),
    wide=st.booleans(),
)
def test_merging_is_the_whole_batch(counts, ratio, seed, wide):
    n = counts[WORLD.rank % 4]
    x = np.random.default_rng([seed, WORLD.rank]).normal(ratio, 1.0, (n, 3))
    mean = x.mean(axis=0) if n else np.zeros(3)
    m2 = ((x - mean) ** 2).sum(axis=0)
    if wide:
        mean = np.stack((mean, (x - mean).mean(axis=0) if n else np.zeros(3)))
    total, merged, var = exchange.merge_moments(resolve(None), WIDE if wide else CALL, n, mean, m2)
    values = WORLD.allgather(x)
    same = len(set(WORLD.allgather((total, merged.tobytes(), var.tobytes())))) == 1
    expected_mean, expected_var = whole_batch(values)
    with together():
        assert same
        assert total == sum(len(v) for v in values)
        assert np.allclose(merged.astype(float), expected_mean.astype(float), rtol=1e-14, atol=1e-14)
        error = np.abs((var - expected_var) / expected_var).max()
        if wide:
            assert error < 1e-12 or np.abs(var - expected_var).max() < 1e-13
        else:  # about 2e-16 * (mean / std)**2
            assert np.abs(var - expected_var).max() < 1e-14 * (1 + ratio**2)


@pytest.mark.parametrize("wide", [False, True])
def test_the_mean_of_one_value_is_that_value(group, wide):
    """One value in the group gives that mean and a variance of 0. Layers refuse this batch."""
    count = int(WORLD.rank == WORLD.size - 1)
    mean = np.full(3, 2.5 * count)
    call, mean = (WIDE, np.stack((mean * 0.75, mean * 0.25))) if wide else (CALL, mean)
    total, merged, var = exchange.merge_moments(group, call, count, mean, np.zeros(3))
    assert total == 1
    assert merged.tolist() == [2.5] * 3
    assert var.tolist() == [0.0] * 3


def test_float64_where_the_first_rank_has_no_data():
    """Means are merged as distances from a rank with data, or large means would lose digits."""
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
    """Single values near 2**53 give their variance, even if their mean is no float64."""
    n = int(WORLD.rank > 0 or WORLD.size == 1)
    small = 2.0 * np.arange(min(1, WORLD.size - 1), WORLD.size) ** 2
    mean = np.full(3, 2.0**53 + 2 * WORLD.rank**2) * n
    _, merged, var = exchange.merge_moments(resolve(None), WIDE, n, np.stack((mean, mean * 0)), np.zeros(3))
    assert np.allclose(var, small.var(), rtol=1e-14, atol=0)
    assert np.abs(merged - 2.0**53 - small.mean()).max() <= 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wide", [False, True])
def test_nan_and_infinity_stay_in_their_channel_and_reach_every_rank(bad, wide):
    mean, m2 = np.zeros((2, 3)) if wide else np.zeros(3), np.ones(3)
    if WORLD.rank == WORLD.size - 1:
        mean[..., 1] = bad
        m2[1] = np.nan
    with np.errstate(all="ignore"):
        total, merged, var = exchange.merge_moments(resolve(None), WIDE if wide else CALL, 2, mean, m2)
    assert total == 2 * WORLD.size
    assert np.isfinite(merged).tolist() == [True, False, True]
    assert np.isfinite(var).tolist() == [True, False, True]


def test_results_outlive_the_next_message():
    """Exchanges reuse their buffer, but do not change results that they have returned."""
    group, one = resolve(None), np.ones(3)
    first = exchange.merge_moments(group, CALL, 1, one, one)
    sums = exchange.reduce_sums(group, CALL, one, one)
    kept = [v.copy() for v in (*first[1:], *sums)]
    exchange.merge_moments(group, CALL, 1, one * 5, one * 7)
    exchange.reduce_sums(group, CALL, one * 5, one * 7)
    for before, after in zip(kept, (*first[1:], *sums), strict=True):
        assert np.array_equal(before, after)


def test_counts_are_whole_numbers_beyond_half_precision():
    total, _, _ = exchange.merge_moments(resolve(None), CALL, 2**40 + WORLD.rank, np.zeros(3), np.zeros(3))
    assert total == WORLD.size * 2**40 + sum(range(WORLD.size))


def test_the_status_of_a_waiting_rank(recorded):
    """A waiting rank's status names its exchange, for reports (rank_status.py)."""
    group, one = recorded.group, np.ones(3)
    exchange.merge_moments(group, CALL, 1, one, one)
    exchange.merge_moments(group, WIDE, 1, np.ones((2, 3)), one)
    exchange.reduce_sums(group, CALL._replace(direction="backward"), one, one)
    exchange.serve_joined(group)
    doing = [
        "forward of a layer (3 channels, float32)",
        "forward of a layer (3 channels, float64)",
        "backward of a layer (3 channels, float32)",
        "answer of no layer, for want of data (0 channels, any)",
    ]
    said = [state.rpartition(", for ")[0] for state in recorded.states]
    assert said == [f"waits in exchange number {i + 1}, {what}" for i, what in enumerate(doing)]


def test_no_exchange_is_seen_after_it(group):
    """No call is left as the current one after an exchange: the watchdog would wait for its end."""
    ones, seen = np.ones(3), []
    for call in (
        lambda: exchange.merge_moments(group, CALL, 1, ones, ones),
        lambda: exchange.reduce_sums(group, CALL, ones, ones),
        lambda: exchange.merge_moments(group, WIDE, 1, np.ones((2, 3)), ones),
        lambda: exchange.serve_joined(group),  # all ranks call it, so it returns at once
    ):
        call()
        seen.append(group.rank_status.current_call)
    assert seen == [None] * 4
    assert group.rank_status.exchanges == 4


def test_sums_of_any_number_of_vectors(group):
    vectors = [np.arange(3.0) + 10 * i + WORLD.rank for i in range(4)]
    sums = [exchange.reduce_sums(group, CALL, *vectors[:n]) for n in (1, 2, 3, 4)]
    ranks = sum(range(WORLD.size))
    expected = [(WORLD.size * (np.arange(3) + 10 * i) + ranks).tolist() for i in range(4)]
    assert [[v.tolist() for v in each] for each in sums] == [expected[:n] for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("kind", ["float32", "float64", "sums"])
def test_ranks_in_different_layers_find_out(kind, group):
    """Every rank raises a mismatch, for every kind of message, and the next exchange works."""
    one = np.ones(3)

    def attempt(layer):
        call = (WIDE if kind == "float64" else CALL)._replace(layer=layer)
        if kind == "sums":
            return exchange.reduce_sums(group, call, one, one)[0]
        return exchange.merge_moments(group, call, 1, np.ones((2, 3)) if kind == "float64" else one, one)[1]

    layer = "the last" if WORLD.rank == WORLD.size - 1 else "another"
    error = error_of(lambda: attempt(layer), CollectiveMismatchError)
    after = attempt("the same")
    assert (error is not None) == (WORLD.size > 1)
    if error is not None:
        assert str(error).count("forward of the last (") == 1
        assert str(error).count("forward of another (") == WORLD.size - 1
    assert after.tolist() == [{"sums": WORLD.size, "float32": 1, "float64": 2}[kind]] * 3


STEPS = (3, 0, 1, 2)  # exchanges that each rank makes before its data ends, by rank % 4


@pytest.mark.parametrize("debug", [False, True])
def test_ranks_without_data_answer_the_others(group, debug):
    """The result of each exchange is that of the ranks that still have data."""
    group.debug, group.in_join_context = debug, True
    mean, m2, count = np.arange(3.0) + 1 + WORLD.rank, np.arange(3.0), 2 + WORLD.rank
    found = []
    for step in range(STEPS[WORLD.rank % 4]):
        if step == 0:
            found.append(exchange.merge_moments(group, CALL, count, mean, m2))
        elif step == 1:
            found.append(exchange.reduce_sums(group, CALL, mean, m2))
        else:
            found.append(exchange.merge_moments(group, WIDE, count, np.stack((mean, mean * 0)), m2))
    exchange.serve_joined(group)
    exchanges = WORLD.allgather(group.exchanges)
    group.in_join_context = False
    exchange.reduce_sums(group, CALL, mean)
    with together():
        assert exchanges == [4] * WORLD.size
        for step, results in enumerate(found):
            those = [rank for rank in range(WORLD.size) if STEPS[rank % 4] > step]
            counts = np.array([2.0 + rank for rank in those])[:, None]
            means = np.array([np.arange(3.0) + 1 + rank for rank in those])
            total, whole = counts.sum(), (counts * means).sum(0) / counts.sum()
            var = (len(those) * np.arange(3.0) + (counts * (means - whole) ** 2).sum(0)) / total
            expected = (means.sum(0), len(those) * np.arange(3.0)) if step == 1 else (total, whole, var)
            for ours, theirs in zip(results, expected, strict=True):
                assert np.allclose(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_fingerprint_may_be_zero(group, monkeypatch):
    """A rank without data takes part in an exchange whose fingerprint is 0, as in any other."""
    monkeypatch.setattr(exchange.fingerprint, "fingerprint", lambda call, exchanges: 0)
    group.in_join_context = True
    total = None
    if WORLD.rank == 0:
        total, _, _ = exchange.merge_moments(group, CALL, 5, np.ones(3), np.ones(3))
    exchange.serve_joined(group)
    assert total == (5 if WORLD.rank == 0 else None)


@pytest.fixture(params=["host", "device"])
def far(request, monkeypatch):
    """Yield a group that has made no exchange yet, and an emulated device for its tensors."""
    monkeypatch.setattr(transport, "chosen", lambda MPI: (request.param, "the test says so"))
    device, group = pretend(monkeypatch), Communicator()
    # Waits for the device in an exchange. A message on it takes two: before MPI, and after.
    group.waits = {"host": 1, "device": 2}[request.param]
    yield group, device
    group.free()


without_gpu = pytest.mark.skipif(GPU, reason="test_cuda.py has its own")


@without_gpu
@pytest.mark.parametrize("first", range(5))
def test_every_message_goes_where_the_group_agreed(first, far):
    """The first message of a group, too, uses the transport on which its ranks have agreed."""
    group, device = far
    mean, m2 = torch.arange(3.0).double() + WORLD.rank, torch.ones(3).double()
    exchanges = [
        lambda: exchange.merge_moments(group, CALL, 2, mean, m2)[1],
        lambda: exchange.merge_moments(group, WIDE, 2, torch.stack((mean, mean * 0)), m2)[1],
        *(lambda n=n: exchange.reduce_sums(group, CALL, *[mean, m2, m2][:n])[0] for n in (1, 2, 3)),
    ]
    found, waits = [], [device.waits]
    for number in (first, *range(5)):
        found.append(exchanges[number]() / (WORLD.size if number > 1 else 1))
        waits.append(device.waits)
    expected = np.arange(3.0) + (WORLD.size - 1) / 2
    assert np.allclose(found, expected)
    assert np.diff(waits).tolist() == [group.waits] * 6


class Buffers(Recorder):
    """A recorder of the memory that MPI gets, as pairs of addresses: begin and end."""

    def Allgather(self, message, gathered):
        given = [each for each in (message, gathered) if each is not MPI.IN_PLACE]
        memory = [each[0] if isinstance(each, list) else each for each in given]
        addresses = [np.frombuffer(each, np.uint8) for each in memory]
        self.messages += [(each.ctypes.data, each.ctypes.data + each.nbytes) for each in addresses]
        self.comm.Allgather(message, gathered)


@without_gpu
@pytest.mark.parametrize("where", ["near", "far"])
def test_mpi_gets_no_memory_twice(where, far):
    """The buffers of a call do not overlap: MPI forbids it, and a few libraries refuse it."""
    group, _ = far
    recorder = Buffers(group)
    mean, m2 = np.ones((2, 3)), np.ones(3)
    if where == "far":
        mean, m2 = torch.from_numpy(mean), torch.from_numpy(m2)
    exchange.merge_moments(group, WIDE, 2, mean, m2)
    assert recorder.messages
    assert all(a[1] <= b[0] or b[1] <= a[0] for a, b in combinations(recorder.messages, 2))
