"""functional.py on NumPy arrays and torch tensors, against the whole batch in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpisyncbn import functional, transport
from mpisyncbn.functional import BatchStats
from mpisyncbn.kernels import native
from support.oracle import bits_equal_on_all_ranks, distance, oracle, shard
from support.ranks import WORLD, together

needs_native = pytest.mark.skipif(native() is None, reason="the native kernels were not built")
KINDS = {"numpy": lambda t: t.numpy(), "torch": lambda t: t}


def run(kind, x, dy, weight, bias, process_group=None):
    """Forward and backward; the results as torch tensors."""
    x, dy = KINDS[kind](x), KINDS[kind](dy)
    weight, bias = (None if v is None else KINDS[kind](v) for v in (weight, bias))
    y, stats = functional.batch_norm_forward(x, weight, bias, process_group=process_group)
    gradients = functional.batch_norm_backward(dy, x, stats, weight, process_group=process_group)
    for result in (y, *stats[:3], *gradients):
        assert type(result) is type(x)
    as_tensor = [torch.as_tensor(r) for r in (y, *stats[:3], *gradients)]
    return *as_tensor, stats.count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3,), (4, 7), (5, 8, 8), (2, 3, 4, 5)], ids=str)
def test_uneven_batches(kind, affine, shape):
    x, dy = shard((2 + WORLD.rank, *shape), 1, 2.0), shard((2 + WORLD.rank, *shape), 2)
    weight, bias = (torch.arange(1.0, shape[0] + 1), torch.ones(shape[0])) if affine else (None, None)
    y, mean, var, invstd, dx, dweight, dbias, count = run(kind, x, dy, weight, bias)
    expected = oracle(x, dy, weight, bias)
    sums = WORLD.allreduce(torch.stack([dweight, dbias]).double())
    same = [bits_equal_on_all_ranks(v) for v in (mean, var, invstd)]
    assert count == expected.count
    assert all(same)
    assert distance(var, expected.var) < 1e-6
    assert distance(mean, expected.mean, expected.var.sqrt()) < 1e-7
    assert distance(y, expected.y) < 1e-6
    assert distance(dx, expected.dx, dy / expected.var.sqrt().min()) < 1e-5
    assert distance(sums[0], expected.dweight, dy.abs().sum()) < 1e-6
    assert distance(sums[1], expected.dbias, dy.abs().sum()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_float64_at_mean_over_std_of_a_million(kind):
    x, dy = (shard((40 + WORLD.rank, 4, 5), seed, mean, torch.float64) for seed, mean in ((1, 1e6), (2, 0.0)))
    y, mean, var, *_ = run(kind, x, dy, None, None)
    # the reference, in more digits than float64 has
    whole = np.concatenate(WORLD.allgather(x.numpy())).astype(np.longdouble)
    exact = whole.var(axis=(0, 2))
    assert np.abs((var.numpy() - exact) / exact).max() < 1e-12
    assert np.abs((mean.numpy() - whole.mean(axis=(0, 2))) / np.sqrt(exact)).max() < 1e-9
    assert distance(y, oracle(x, dy).y) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_batches(kind, dtype):
    """Rank 0 has data; with four ranks so has rank 2."""
    n = 5 if WORLD.rank % 2 == 0 else 0
    x, dy = shard((n, 3, 4), 1, dtype=dtype), shard((n, 3, 4), 2, dtype=dtype)
    y, _, var, _, dx, dweight, dbias, count = run(kind, x, dy, None, None)
    expected = oracle(x, dy)
    assert count == expected.count == 20 * ((WORLD.size + 1) // 2)
    assert distance(var, expected.var) < 1e-6
    assert distance(y, expected.y) < 1e-6
    assert distance(dx, expected.dx) < 1e-5
    assert n or ((dweight == 0).all() and (dbias == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nobody_has_data(kind, dtype):
    x = torch.zeros(0, 3, 4, dtype=dtype)
    y, mean, var, _, dx, _, _, count = run(kind, x, x, None, None)
    running = torch.ones(3), torch.ones(3)
    updated = functional.update_running_stats(*running, BatchStats(mean, var, None, count), 0.5)
    assert not updated
    assert count == 0
    assert y.shape == dx.shape == x.shape
    assert torch.equal(torch.cat(running), torch.ones(6))


@pytest.mark.parametrize("layer", ["float32", "float64"])
def test_the_message_does_not_depend_on_the_input(layer, monkeypatch):
    """A rank with an empty batch sends as much as the others, and counts never travel in float16."""
    from mpisyncbn.communicator import resolve

    group, lengths = resolve(None), []
    make = type(group).message
    monkeypatch.setattr(group.ready(), "link", None)  # native code has a message of its own
    monkeypatch.setattr(type(group), "message", lambda self, n: (lengths.append(n), make(self, n))[1])
    n = 70000 if WORLD.rank == 0 else 0  # beyond float16
    dtype = torch.float64 if layer == "float64" else torch.float16
    x = torch.ones(n, 2, dtype=dtype)
    _, stats = functional.batch_norm_forward(x)
    functional.batch_norm_backward(x, x, stats)
    assert stats.count == 70000
    assert lengths == [(3 if layer == "float64" else 2) * 2 + 3, 2 * 2 + 3]


@pytest.mark.parametrize("value", [5.0, 0.1, -1e-3, 3e7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eps_zero_and_a_constant_channel(value, dtype):
    """The output is the bias and no gradient flows, for every way that rounding can go."""
    for samples in (3, 37 + 2 * WORLD.rank):
        x = torch.full((samples, 2, 31), value, dtype=dtype)
        y, stats = functional.batch_norm_forward(x, eps=0.0)
        dx, _, _ = functional.batch_norm_backward(shard(tuple(x.shape), 1, dtype=dtype), x, stats)
        assert torch.equal(y, torch.zeros_like(x))
        assert torch.equal(dx, torch.zeros_like(x))
        assert torch.equal(stats.invstd, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_follow_torchs_formula(kind, momentum):
    make = KINDS[kind]
    mean, var = torch.tensor([1.0, -2.0]).double(), torch.tensor([4.0, 9.0]).double()
    running_mean, running_var = make(torch.zeros(2)), make(torch.ones(2))
    stats = BatchStats(make(mean), make(var), None, 5)
    assert functional.update_running_stats(running_mean, running_var, stats, momentum)
    assert np.allclose(running_mean, momentum * mean)
    assert np.allclose(running_var, (1 - momentum) + momentum * var * 5 / 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39])
@pytest.mark.parametrize("where", ["mean", "var"])
def test_what_is_not_finite_never_enters_the_running_statistics(bad, where):
    good, spoilt = np.ones(2), np.array([1.0, bad])
    stats = BatchStats(spoilt if where == "mean" else good, spoilt if where == "var" else good, None, 5)
    running = torch.zeros(2), torch.ones(2)
    functional._warn_not_finite.cache_clear()
    with pytest.warns(RuntimeWarning, match="kept out of the running statistics") as caught:
        assert not functional.update_running_stats(*running, stats, 0.1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only one warning
        assert not functional.update_running_stats(*running, stats, 0.1)
    assert torch.equal(torch.stack(running), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


def test_an_infinite_variance_of_float64_stays_out_too():
    running = torch.zeros(2).double(), torch.ones(2).double()
    infinite = BatchStats(np.ones(2), np.array([1.0, np.inf]), None, 5)
    functional._warn_not_finite.cache_clear()
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert not functional.update_running_stats(*running, infinite, 0.1)
    large = BatchStats(np.ones(2), np.full(2, 1e200), None, 5)  # whose square overflows, but which fits
    assert functional.update_running_stats(*running, large, 1.0)
    assert np.allclose(running[1], 1.25e200)


@pytest.mark.parametrize("momentum", [np.float64(0.25), np.float32(0.25), torch.tensor(0.25).double(), 0.25])
def test_momentum_of_any_kind(momentum):
    for running in ((torch.zeros(2), torch.ones(2)), (torch.zeros(2).bfloat16(), torch.ones(2).bfloat16())):
        stats = BatchStats(np.array([1.0, 2.0]), np.array([4.0, 8.0]), None, 5)
        assert functional.update_running_stats(*running, stats, momentum)
        assert running[0].tolist() == [0.25, 0.5]
        assert running[1].tolist() == [2.0, 3.25]


@needs_native
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1 / 3, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_running_statistics_in_native_code(dtype, momentum, monkeypatch):
    """The values of torch's operations: rounded once, after the sum; what overflows the dtype stays out."""
    limit, n = torch.finfo(dtype).max, 1 << 14
    mean, var = (shard((n,), seed, 1.0, torch.float64).numpy() for seed in (1, 2))
    mean[:8] = 0, 1e-30, -1e-7, 2**-24, 2**-25, 1 + 2**-9, limit, -limit
    start = [shard((n,), seed, 1.0).to(dtype) for seed in (3, 4)]
    start[0][8:12] = torch.tensor([torch.inf, torch.nan, limit, 0.0])
    found = []
    for host in (native(), None):
        monkeypatch.setattr(functional, "native", lambda host=host: host)
        running, batches = [each.clone() for each in start], torch.tensor(0)
        taken = BatchStats(mean, abs(var), None, 5)
        arrays = *running, batches, None, taken.mean, taken.var
        assert host is None or host.update_running_stats(*arrays, 1.25, momentum)
        assert host is not None or functional.enter_batch(*running, batches, taken, momentum)
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
    """Also what is so large that the batch is lost beside it."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        running = torch.full((2,), 1e30, dtype=dtype), torch.full((2,), 1e30, dtype=dtype)
        assert functional.update_running_stats(*running, BatchStats(*np.ones((2, 2)), None, 2**60), 1.0)
        assert torch.equal(torch.stack(running), torch.ones(2, 2, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_running_statistics_are_rounded_as_by_torchs_lerp(kind, seen, momentum, monkeypatch):
    """Without native code; and as on a device, where the host does not see the statistics."""
    monkeypatch.setattr(functional, "native", lambda: None)
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
            monkeypatch.setattr(transport, "known", lambda number: False)
            stats = BatchStats(*map(make, batch), None, 2**60)
            assert functional._enter_unseen(*running, None, stats, number)
        for found, old, new in zip(running, start, batch, strict=True):
            # but for one rounding: torch's may be a multiply-add
            assert np.allclose(found, old.lerp(new, momentum), rtol=4e-16, atol=0)
            assert momentum < 1 or torch.equal(torch.as_tensor(found), new)


@needs_native
def test_dtypes_that_are_taken_at_a_glance():
    """All of the input's, or all float32 beside half precision; others are looked at more closely."""
    halves = torch.bfloat16, torch.float16
    for x in (*halves, torch.float32, torch.float64):
        for first in (*halves, torch.float32, torch.float64):
            for second in (*halves, torch.float32, torch.float64):
                vectors = [torch.ones(3, dtype=each) for each in (first, first, second, second)]
                fits = first == second and (first == x or (x in halves and first == torch.float32))
                assert native().fits(torch.ones(2, 3, dtype=x), *vectors) == fits
        plain = torch.ones(2, 3, dtype=x)
        assert native().fits(plain, None, None, None, None)
        ones = torch.ones(3, dtype=torch.float32)
        assert native().fits(plain, None, None, ones, ones) == (x != torch.float64)


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


@given(
    sizes=st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(lambda s: s[0] > 1),
    inner=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kind=st.sampled_from(list(KINDS)),
    mean=st.sampled_from([0.0, 1.0, 1000.0]),
)
def test_any_split(sizes, inner, dtype, kind, mean):
    shape = (sizes[WORLD.rank % 4], *inner)
    x, dy = shard(shape, 3, mean, dtype), shard(shape, 4, 0.0, dtype)
    y, _, var, _, dx, *_ = run(kind, x, dy, None, None)
    expected = oracle(x, dy)
    # with two values a channel, rounding the input already costs this much
    scale = max(1.0, (dy.abs().max() / (expected.var + 1e-5).sqrt().min()).item() if dy.numel() else 1.0)
    with together():
        assert ((var - expected.var).abs() <= 1e-6 * expected.var + 1e-13 * mean * mean).all()
        assert distance(y, expected.y, torch.tensor(1.0)) < (1e-3 if mean > 1 else 1e-5)
        assert distance(dx, expected.dx, torch.tensor(scale)) < (1e-3 if mean > 1 else 1e-5)


class Subclass(np.ndarray):
    pass


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [lambda x: x.view(Subclass), lambda x: x.view(np.recarray)])
def test_arrays_that_are_more_than_arrays(kind, dtype):
    x = np.random.default_rng(WORLD.rank).normal(size=(3 + WORLD.rank, 4, 5)).astype(dtype)
    y, stats = functional.batch_norm_forward(kind(x))
    dx, _, _ = functional.batch_norm_backward(kind(x), kind(x), stats)
    plain, plain_stats = functional.batch_norm_forward(x)
    plain_dx, _, _ = functional.batch_norm_backward(x, x, plain_stats)
    with together():
        assert np.allclose(y, plain, atol=1e-5)
        assert np.allclose(dx, plain_dx, atol=1e-5)


@pytest.mark.parametrize("count", [np.int64(5), np.uint8(5), 5])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_a_count_of_any_kind(kind, count):
    running = kind([0.0, 0.0]), kind([1.0, 1.0])
    stats = BatchStats(np.array([1.0, 2.0]), np.array([4.0, 8.0]), None, count)
    assert functional.update_running_stats(*running, stats, 0.25) is True
    assert running[0].tolist() == [0.25, 0.5]
    assert running[1].tolist() == [2.0, 3.25]
    nothing = stats._replace(count=count * 0)
    assert functional.update_running_stats(*running, nothing, 0.25) is False
    assert running[0].tolist() == [0.25, 0.5]


@pytest.mark.parametrize("eps", [0, 0.0, 1e-5, 3])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_invstd(kind, eps):
    """Without eps a channel that does not vary has 0, so that what comes of it is finite."""
    var = np.array([0.0, 0.25, 4.0])
    found = functional.invstd_of(kind(var), eps)
    expected = (var + eps) ** -0.5 if eps else [0.0, 2.0, 0.5]
    assert found.tolist() == pytest.approx(list(expected), rel=1e-15)


@pytest.mark.parametrize("kind", [np.ones, torch.ones])
def test_backward_looks_at_its_arguments(kind):
    x = kind((4, 3))
    _, stats = functional.batch_norm_forward(x)
    for bad, error in ((kind(4), ValueError), ("weight", TypeError)):
        with pytest.raises(error, match="expected weight"):
            functional.batch_norm_backward(x, x, stats, bad)
    with pytest.raises(TypeError, match="positional"):
        functional.batch_norm_backward(x, x, stats, None, WORLD)


@pytest.mark.parametrize("count", [1, 2, 3, torch.tensor(2), torch.tensor(3)])
def test_statistics_that_the_host_does_not_see(count):
    """As on a device, or in a compiled graph."""
    running = torch.zeros(2), torch.ones(2)
    stats = BatchStats(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), None, count)
    assert functional._enter_unseen(*running, None, stats, 0.5)
    unbiased = stats.var * (int(count) / max(int(count) - 1, 1))
    assert torch.equal(running[0], stats.mean / 2)
    assert torch.allclose(running[1], (1 + unbiased) / 2)
