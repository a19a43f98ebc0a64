"""Running statistics: the formula, its rounding, and the batches that are kept out of them."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch

import mpisyncbn
from mpisyncbn import functional, running_stats
from mpisyncbn.batch_stats import BatchStats
from mpisyncbn.comm import transport
from mpisyncbn.kernels import native
from support.oracle import distance, local_batch, shard
from support.ranks import no_exchange

pytestmark = no_exchange
needs_native = pytest.mark.skipif(native() is None, reason="the native kernels were not built")
KINDS = {"numpy": lambda t: t.numpy(), "torch": lambda t: t}
LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("count", [2, 5, np.int64(5), np.uint8(5), torch.tensor(2)], ids=repr)
@pytest.mark.parametrize(
    "momentum", [0.0, 0.1, 1.0, np.float64(0.25), np.float32(0.25), torch.tensor(0.25).double()], ids=repr
)
@pytest.mark.parametrize(
    ("of_batch", "kind", "dtype"),
    [
        ("numpy", "numpy", torch.float32),
        ("numpy", "torch", torch.float32),
        ("numpy", "torch", torch.bfloat16),
        ("torch", "torch", torch.float32),
    ],
)
def test_running_statistics_follow_torchs_formula(of_batch, kind, dtype, momentum, count):
    mean, var = torch.tensor([1.0, -2.0]).double(), torch.tensor([4.0, 8.0]).double()
    running = [KINDS[kind](torch.full((2,), start, dtype=dtype)) for start in (0.0, 1.0)]
    number = KINDS[of_batch](count) if isinstance(count, torch.Tensor) else count
    momentum = KINDS[kind](momentum) if isinstance(momentum, torch.Tensor) else momentum
    stats = BatchStats(*map(KINDS[of_batch], (mean, var)), None, number)
    entered = functional.update_running_stats(*running, stats, momentum)
    nothing = functional.update_running_stats(*running, stats._replace(count=number * 0), momentum)
    weight, unbiased = float(momentum), var * int(count) / (int(count) - 1)
    assert (entered, nothing) == (True, False)
    for found, expected in zip(running, (weight * mean, 1 - weight + weight * unbiased), strict=True):
        assert np.allclose(torch.as_tensor(found).double(), expected, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [(np.nan, torch.float32), (np.inf, torch.float32), (1e39, torch.float32), (np.inf, torch.float64)],
)
@pytest.mark.parametrize("where", ["mean", "var"])
def test_a_batch_that_is_not_finite_is_not_recorded(bad, dtype, where):
    good, spoilt = np.ones(2), np.array([1.0, bad])
    stats = BatchStats(spoilt if where == "mean" else good, spoilt if where == "var" else good, None, 5)
    running = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    running_stats._warn_not_finite.cache_clear()
    with pytest.warns(RuntimeWarning, match="kept out of the running statistics") as caught:
        assert not functional.update_running_stats(*running, stats, 0.1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only one warning
        assert not functional.update_running_stats(*running, stats, 0.1)
    assert torch.stack(running).tolist() == [[0, 0], [1, 1]]


# By native code, by torch's operations, and without the host, which reads no tensor's count.
COUNTS = {"native": 2, "plain": 2, "unseen": torch.tensor(2)}


def stats_of(mean: float, var: float, count: object) -> BatchStats:
    vectors = (torch.tensor(pair, dtype=torch.float64) for pair in ([mean, -mean], [var, var]))
    make = KINDS["torch" if isinstance(count, torch.Tensor) else "numpy"]
    return BatchStats(*map(make, vectors), None, count)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, LARGEST), (torch.float64, 1e200)], ids=str)
@pytest.mark.parametrize("way", COUNTS)
def test_the_largest_statistics_that_fit_are_recorded(way, dtype, largest, monkeypatch):
    if way == "plain":
        monkeypatch.setattr(running_stats, "native", lambda: None)
    for mean, var in ((largest, 1.0), (0.0, largest / 2)):
        running = torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype)
        assert functional.update_running_stats(*running, stats_of(mean, var, COUNTS[way]), 0.5)
        assert running[0].tolist() == [mean / 2, -mean / 2]
        assert running[1].tolist() == [var, var]


@pytest.mark.parametrize(
    ("mean", "var", "count"), [(1.0, 1.0, 0), (np.inf, 1.0, 2), (1.0, np.inf, 2), (1.0, LARGEST, 2)]
)
def test_statistics_that_the_host_does_not_read_are_recorded_as_a_whole(mean, var, count):
    running, batches = (torch.zeros(2), torch.ones(2)), torch.tensor(7)
    stats = stats_of(mean, var, torch.tensor(count))
    refused = running_stats.record_batch(*running, batches, stats, 0.5)
    kept = [*running[0].tolist(), *running[1].tolist(), batches.item()]
    entered = running_stats.record_batch(*running, batches, stats_of(2.0, 3.0, torch.tensor(1)), 0.5)
    assert not refused
    assert kept == [0, 0, 1, 1, 7]
    assert entered
    assert [*running[0].tolist(), *running[1].tolist(), batches.item()] == [1, -1, 2, 2, 8]


@needs_native
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1 / 3, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_running_statistics_in_native_code(dtype, momentum, monkeypatch):
    """Values are torch's, rounded once, after the sum. A batch that overflows is kept out."""
    limit, n = torch.finfo(dtype).max, 1 << 14
    mean, var = (shard((n,), seed, 1.0, torch.float64).numpy() for seed in (1, 2))
    mean[:8] = 0, 1e-30, -1e-7, 2**-24, 2**-25, 1 + 2**-9, limit, -limit
    start = [shard((n,), seed, 1.0).to(dtype) for seed in (3, 4)]
    start[0][8:12] = torch.tensor([torch.inf, torch.nan, limit, 0.0])
    found = []
    for host in (native(), None):
        monkeypatch.setattr(running_stats, "native", lambda host=host: host)
        running, batches = [each.clone() for each in start], torch.tensor(0)
        taken = BatchStats(mean, abs(var), None, 5)
        arrays = *running, batches, None, taken.mean, taken.var
        assert host is None or host.update_running_stats(*arrays, 1.25, momentum)
        assert host is not None or running_stats.record_batch(*running, batches, taken, momentum)
        found.append((*running, batches))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        assert torch.equal(one.isnan(), other.isnan())

    arrays = start[0], start[1].abs(), None, None
    ones = np.ones(n)
    for mean, var in ((ones * limit * (1 + 1e-9), ones), (ones, ones * limit), (ones * np.nan, ones)):
        before = [each.clone() for each in start]
        assert not native().update_running_stats(*arrays, mean, var, 1.25, momentum)
        assert all(
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(start, before, strict=True)
        )


def test_a_momentum_of_one_forgets():
    """A momentum of 1 forgets even old values beside which the batch would vanish by rounding."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        running = torch.full((2,), 1e30, dtype=dtype), torch.full((2,), 1e30, dtype=dtype)
        assert functional.update_running_stats(*running, BatchStats(*np.ones((2, 2)), None, 2**60), 1.0)
        assert torch.equal(torch.stack(running), torch.ones(2, 2, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_running_statistics_are_rounded_as_by_torchs_lerp(kind, seen, momentum, monkeypatch):
    """Updates without native code round like torch's lerp, even if the host does not see them."""
    monkeypatch.setattr(running_stats, "native", lambda: None)
    make = KINDS[kind]
    means, variances = [1e30, -1e30, 1e-30, 3.0, 0.0], [1e30, 7.0, 1e-9, 0.0, 1.0]
    start = [torch.tensor(each, dtype=torch.float64) for each in (means, variances)]
    batch = shard((5,), 1, 1.0, torch.float64), shard((5,), 2).double().square()
    for number in (momentum, make(torch.tensor(momentum, dtype=torch.float64))):
        running = [make(each.clone()) for each in start]
        if seen:
            stats = BatchStats(*(each.numpy() for each in batch), None, 2**60)
            assert functional.update_running_stats(*running, stats, number)
        else:
            monkeypatch.setattr(transport, "is_readable_now", lambda number: False)
            stats = BatchStats(*map(make, batch), None, 2**60)
            assert running_stats._record_without_sync((*running, None), stats, number)
        for found, old, new in zip(running, start, batch, strict=True):
            # up to one rounding: torch may use a fused multiply-add
            assert np.allclose(found, old.lerp(new, momentum), rtol=4e-16, atol=0)
            assert momentum < 1 or torch.equal(torch.as_tensor(found), new)


@needs_native
def test_dtypes_that_are_taken_at_a_glance():
    """The fast check passes only vectors of the input's dtype, or float32 beside halves."""
    halves = torch.bfloat16, torch.float16
    for x in (*halves, torch.float32, torch.float64):
        for first in (*halves, torch.float32, torch.float64):
            for second in (*halves, torch.float32, torch.float64):
                vectors = [torch.ones(3, dtype=each) for each in (first, first, second, second)]
                fits = first == second and (first == x or (x in halves and first == torch.float32))
                assert native().passes_fast_check(torch.ones(2, 3, dtype=x), *vectors) == fits
        plain = torch.ones(2, 3, dtype=x)
        assert native().passes_fast_check(plain, None, None, None, None)
        ones = torch.ones(3, dtype=torch.float32)
        assert native().passes_fast_check(plain, None, None, ones, ones) == (x != torch.float64)


@pytest.mark.parametrize(
    "running",
    [
        *(torch.zeros(shape) for shape in ((2,), (0,), (), (2, 3), (3, 1))),
        *(torch.zeros(shape).int() for shape in ((3,), (3, 1))),
    ],
)
def test_running_statistics_of_another_shape_or_dtype(running):
    stats = BatchStats(np.zeros(3), np.ones(3), None, 5)
    vector = running.ndim == 1 and running.is_floating_point()
    pairs = [(running, torch.ones(3)), (torch.ones(3), running)]
    for pair in pairs if vector else [*pairs, (running, running)]:
        with pytest.raises(
            ValueError, match="expected running_mean and running_var to be floating point, of one length"
        ):
            functional.update_running_stats(*pair, stats, 0.1)
    if vector:
        with pytest.raises(
            ValueError, match=rf"expected stats.mean of {len(running)} channels, got shape \(3,\)"
        ):
            functional.update_running_stats(running, running + 1, stats, 0.1)


@pytest.mark.parametrize("count", [1, 2, 3, torch.tensor(2), torch.tensor(3)])
def test_statistics_that_the_host_does_not_see(count):
    """Statistics of a device or a compiled graph are recorded without a read on the host."""
    running = torch.zeros(2), torch.ones(2)
    stats = BatchStats(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), None, count)
    assert running_stats._record_without_sync((*running, None), stats, 0.5)
    unbiased = stats.var * (int(count) / max(int(count) - 1, 1))
    assert torch.equal(running[0], stats.mean / 2)
    assert torch.allclose(running[1], (1 + unbiased) / 2)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_model_that_is_made_in_inference_mode(momentum):
    """Autograd counts no changes of its tensors."""
    x = shard((local_batch(), 3, 2), 3)
    layer = mpisyncbn.SyncBatchNorm(3, momentum=momentum)
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
        for each in (layer, copied):
            for _ in range(2):
                each(x)
    for name, expected in layer.named_buffers():
        assert distance(copied.get_buffer(name), expected) < 1e-6
    assert layer.num_batches_tracked == 2
