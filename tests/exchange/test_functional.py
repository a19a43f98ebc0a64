"""functional.py on NumPy arrays and torch tensors, against the whole batch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpisyncbn import functional
from mpisyncbn.batch_stats import BatchStats, invstd_of
from support.oracle import bits_equal_on_all_ranks, distance, oracle, shard
from support.ranks import WORLD, together

KINDS = {"numpy": lambda t: t.numpy(), "torch": lambda t: t}


def run(kind, x, dy, weight, bias, process_group=None):
    """Run forward and backward. Return the results as torch tensors, and the count."""
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
    """Only ranks with an even number have data."""
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
def test_no_rank_has_data(kind, dtype):
    x = torch.zeros(0, 3, 4, dtype=dtype)
    y, mean, var, _, dx, _, _, count = run(kind, x, x, None, None)
    running = torch.ones(3), torch.ones(3)
    updated = functional.update_running_stats(*running, BatchStats(mean, var, None, count), 0.5)
    assert not updated
    assert count == 0
    assert y.shape == dx.shape == x.shape
    assert torch.equal(torch.cat(running), torch.ones(6))


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float16, 2), (torch.float64, 3)], ids=str)
def test_the_message_does_not_depend_on_the_input(dtype, rows, recorded):
    """A rank with an empty batch sends as much as others. Counts never travel in float16."""
    x = torch.ones(70000 if WORLD.rank == 0 else 0, 2, dtype=dtype)  # a count that float16 cannot hold
    _, stats = functional.batch_norm_forward(x, process_group=recorded.group)
    functional.batch_norm_backward(x, x, stats, process_group=recorded.group)
    assert stats.count == 70000
    assert [len(message) for _, message in recorded.messages] == [rows * 2 + 3, 2 * 2 + 3]


@pytest.mark.parametrize("value", [5.0, 0.1, -1e-3, 3e7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eps_zero_and_a_constant_channel(value, dtype):
    """The output, without a bias, and the gradient are 0, however the mean is rounded."""
    for samples in (3, 37 + 2 * WORLD.rank):
        x = torch.full((samples, 2, 31), value, dtype=dtype)
        y, stats = functional.batch_norm_forward(x, eps=0.0)
        dx, _, _ = functional.batch_norm_backward(shard(tuple(x.shape), 1, dtype=dtype), x, stats)
        assert torch.equal(y, torch.zeros_like(x))
        assert torch.equal(dx, torch.zeros_like(x))
        assert torch.equal(stats.invstd, torch.zeros(2, dtype=torch.float64))


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


@pytest.mark.parametrize("eps", [0, 0.0, 1e-5, 3])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_invstd(kind, eps):
    """If eps is 0, a constant channel has an invstd of 0, so that all results are finite."""
    var = np.array([0.0, 0.25, 4.0])
    found = invstd_of(kind(var), eps)
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
