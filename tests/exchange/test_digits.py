"""Ranks send a second message if, and only if, float64 sums have lost the digits of a variance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpi4py import MPI

import mpisyncbn
from mpisyncbn import exchange, functional
from mpisyncbn.comm import transport
from mpisyncbn.comm.communicator import Communicator
from mpisyncbn.fingerprint import LayerCall, fingerprint
from support.device import GPU, pretend
from support.oracle import bits_equal_on_all_ranks, distance, oracle
from support.ranks import WORLD
from support.versions import compiles

CALL = LayerCall("a layer", "forward", 1, "float32")
AGAIN = CALL._replace(direction="forward once more")
STEP = 0.0625  # the distance from 1e6 to the next float32 number
BOUNDS = [0, *np.cumsum([400 * (1 + r) // sum(range(1, WORLD.size + 1)) for r in range(WORLD.size - 1)]), 400]


def some(x):
    x[:20] += STEP


def as_many_down(x):
    x[:20] += STEP
    x[20:40] -= STEP


def one(x):
    x[-1] += STEP


def ranks(x):
    """Add a constant that differs between the ranks."""
    for rank in range(WORLD.size):
        x[BOUNDS[rank] : BOUNDS[rank + 1]] += STEP * rank


def last_rank(x):
    x[BOUNDS[-2] :] += STEP


def normal(x):
    x += np.random.default_rng(0).normal(0, 1, len(x)).astype("f")


def large(x):
    x *= -1e3
    x += np.random.default_rng(0).normal(0, 300, len(x)).astype("f")


SPREADS = [some, as_many_down, one, ranks, last_rank, normal, large]


def whole(spread=None) -> np.ndarray:
    x = np.full(400, 1e6, "f")
    if spread:
        spread(x)
    return x[:, None]


def mine(x):
    """Return this rank's part of ``x``. Its size is about proportional to the rank plus 1."""
    return x[BOUNDS[WORLD.rank] : BOUNDS[WORLD.rank + 1]]


def moments(x):
    """Return count, mean and M2 of ``x``, as exact as float64 can hold them."""
    if not len(x):
        return 0, np.zeros(x.shape[1]), np.zeros(x.shape[1])
    origin = x[0].astype(float)
    distances = x - origin
    rest = distances.mean(0)
    return len(x), origin + rest, ((distances - rest) ** 2).sum(0)


def exact(x):
    _, mean, m2 = moments(x)
    return mean, m2 / len(x)


@pytest.mark.parametrize("spread", SPREADS, ids=lambda each: each.__name__)
def test_the_variance_is_that_of_the_whole_batch(group, spread):
    """The variance is right if mean / std is above 1e6, however ranks divide the values."""
    x = whole(spread)
    total, mean, var = exchange.merge_moments(group, CALL, *moments(mine(x)))
    same = [bits_equal_on_all_ranks(torch.from_numpy(each)) for each in (mean, var)]
    expected_mean, expected_var = exact(x)
    assert total == 400
    assert np.abs(var - expected_var) <= 1e-7 * expected_var
    assert np.abs(mean - expected_mean) <= 1e-7 * np.sqrt(expected_var)
    assert all(same)
    assert group.exchanges == (2 if expected_var > 0 else 1)


CONSTANTS = np.array([0.1, 1e6, 1 / 3, -3e7, 0.0, 1e-20, 3e30, 1.0, -1000.1], "f").astype(float)


@pytest.mark.parametrize("count", [1, 3 + 4 * WORLD.rank, 50176, 10 * (WORLD.rank % 2), 2**31 + WORLD.rank])
def test_constant_channels_need_one_message(group, count):
    """Constant channels need one message, even without data on ranks. Others stay right."""
    if WORLD.size == 1:
        count += 1
    mean = np.append(CONSTANTS, 2.0) * (count > 0)
    m2 = np.append(0 * CONSTANTS, 3.0) * count
    _, merged, var = exchange.merge_moments(group, CALL._replace(channels=10), count, mean, m2)
    assert group.exchanges == 1
    assert np.allclose(merged[:-1], CONSTANTS, rtol=1e-15)
    assert not var[:-1].any()
    assert var[-1] == pytest.approx(3.0)


def test_constant_channels_of_any_mean_have_no_variance(group):
    """The variance by a constant channel's sums is rounding, of either sign. 0 replaces it."""
    mean = np.random.default_rng(0).normal(size=1000)
    count = 7 + 2 * WORLD.rank
    _, merged, var = exchange.merge_moments(group, CALL._replace(channels=1000), count, mean, np.zeros(1000))
    assert np.allclose(merged, mean, rtol=1e-14)
    assert not var.any()


def test_no_spread_is_taken_for_rounding(group):
    """A variance is kept, however small it is beside the mean."""
    count = int(WORLD.rank == 0)
    m2 = np.array([1e-8, 1e-15, 1e-30, 0.0]) * count
    _, _, var = exchange.merge_moments(group, CALL, count, np.full(4, 1.5) * count, m2)
    assert var.tolist() == [1e-8, 1e-15, 1e-30, 0.0]


def test_ordinary_channels_need_one_message(group):
    """A small variance on one rank, or a mean / std of up to 1e4, needs no second message."""
    count = 2 + WORLD.rank
    mean = np.array([1.0, 1.0, 1e3, 9e3]) * (1 + np.array([WORLD.rank, 0, 0, 0]))
    m2 = np.array([1e-9 if WORLD.rank == 0 else 1.0, 1.0, 1.0, 1.0]) * count
    exchange.merge_moments(group, CALL._replace(channels=4), count, mean, m2)
    if WORLD.size > 1:
        assert group.exchanges == 1


def test_beside_constant_channels(group):
    """Channels are independent: one constant, one that lost digits, one ordinary, one infinite."""
    x = np.concatenate([whole(), whole(some), whole(), whole()], 1)
    x[:, 2] = np.random.default_rng(1).normal(0, 1, 400)
    x[-1, 3] = np.inf
    with np.errstate(all="ignore"):
        _, mean, var = exchange.merge_moments(group, CALL._replace(channels=4), *moments(mine(x)))
        expected = exact(x)[1]
    assert group.exchanges == 2
    assert var[0] == 0
    assert np.allclose(var[1:3], expected[1:3], rtol=1e-9)
    assert np.isfinite(mean).tolist() == np.isfinite(var).tolist() == [True, True, True, False]


def test_the_second_message(recorded):
    """The second message has sums about the float32 mean for channels that lost digits.

    The sums of the other channels are sent again.
    """
    count, mean = 2 + WORLD.rank, np.array([1e6 + STEP * WORLD.rank, 3.0])
    m2 = np.array([STEP**2, 3.0]) * count
    exchange.merge_moments(recorded.group, CALL, count, mean, m2)
    total = WORLD.allreduce(count)
    center = float(np.float32(WORLD.allreduce(count * mean[0]) / total))
    rest = mean - [center, 0]
    hashes = [fingerprint(CALL, 1), fingerprint(AGAIN, 2)]
    bodies = [[count, *(count * m), *(m2 + count * m**2)] for m in (mean, rest)]
    assert [name for name, _ in recorded.messages] == ["Allreduce", "Allreduce"]
    for (_, message), h, mark, body in zip(recorded.messages, hashes, (2.0**-18, 0), bodies, strict=True):
        assert message[:2].tolist() == [h + mark, h * h]
        assert np.allclose(message[2:], body, rtol=1e-15, atol=0)
    assert [state.rpartition(", for ")[0] for state in recorded.states] == [
        "waits in exchange number 1, forward of a layer (1 channels, float32)",
        "waits in exchange number 2, forward once more of a layer (1 channels, float32)",
    ]


def test_a_rank_says_that_it_hides_more_and_others_do_not(recorded):
    """A rank whose sum of squares absorbs M2 adds 2**-18 to the fingerprint, still readable."""
    spread = WORLD.rank == WORLD.size - 1
    m2 = np.array([STEP**2 * spread, 1.0])
    exchange.merge_moments(recorded.group, CALL, 100, np.array([1e6, 1.0]), m2)
    h = fingerprint(CALL, 1)
    assert recorded.messages[0][1][0] == h + 2.0**-18 * spread
    assert len(recorded.messages) == 2


@pytest.mark.parametrize("debug", [False, True])
def test_ranks_without_data_answer_once_more(group, debug):
    """A rank without data (join()) takes part in second messages, also in MPISYNCBN_DEBUG=1."""
    group.debug, group.in_join_context = debug, True
    stays, found = WORLD.rank < max(WORLD.size - 1, 1), []
    x = mine(whole(some)) if stays else np.empty((0, 1), "f")
    for _ in range(2 * stays):
        found.append(exchange.merge_moments(group, CALL, *moments(x)))
    exchange.serve_joined(group)
    exchanges = WORLD.allgather(group.exchanges)
    expected_mean, expected_var = exact(np.concatenate(WORLD.allgather(x)))
    assert len(set(exchanges)) == 1
    for _, mean, var in found:
        assert np.allclose(mean, expected_mean, rtol=1e-15)
        assert np.allclose(var, expected_var, rtol=1e-9)


def test_all_ranks_agree_before_the_second_message(recorded):
    """With MPISYNCBN_DEBUG=1, ranks compare their calls before the second message too."""
    recorded.group.debug = True
    exchange.merge_moments(recorded.group, CALL, *moments(mine(whole(some))))
    assert [name for name, _ in recorded.messages] == ["allgather", "Allreduce"] * 2


@pytest.mark.skipif(GPU, reason="the device is made up, and there is one")
@pytest.mark.parametrize("where", ["host", "device"])
def test_moments_on_a_device(where, monkeypatch):
    monkeypatch.setattr(transport, "chosen", lambda MPI: (where, "the test says so"))
    pretend(monkeypatch)
    group = Communicator()
    x = np.concatenate([whole(some), whole(normal), whole()], 1)
    count, mean, m2 = moments(mine(x))
    mean, m2 = torch.from_numpy(mean), torch.from_numpy(m2)
    _, merged, var = exchange.merge_moments(group, CALL._replace(channels=3), count, mean, m2)
    exchanges = group.exchanges
    constant = [torch.full((3,), 1e6).double(), torch.zeros(3).double()]
    exchange.merge_moments(group, CALL._replace(channels=3), 5, *constant)
    more = group.exchanges - exchanges
    group.free()
    assert np.allclose(merged, exact(x)[0], rtol=1e-15)
    assert np.allclose(var, exact(x)[1], rtol=1e-9, atol=0)
    assert (exchanges, more) == (2, 1)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("spread", [some, normal], ids=lambda each: each.__name__)
def test_output_and_gradient(kind, spread):
    """The output and the gradient of the functions are as exact as float32 allows."""
    x = torch.from_numpy(mine(whole(spread)).copy())
    dy = torch.from_numpy(np.random.default_rng(WORLD.rank).normal(size=x.shape).astype("f"))
    y, stats = functional.batch_norm_forward(kind(x))
    dx, *_ = functional.batch_norm_backward(kind(dy), kind(x), stats)
    expected = oracle(x, dy)
    assert abs(stats.var[0] - expected.var[0]) < 1e-6 * expected.var[0]
    assert distance(torch.as_tensor(y), expected.y) < 1e-5
    assert distance(torch.as_tensor(dx), expected.dx) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiles)])
def test_layer(compiled):
    """A layer's statistics, output and gradient are right, eager and compiled."""
    layer = mpisyncbn.SyncBatchNorm(1, momentum=1.0)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.from_numpy(mine(whole(some)).copy()).requires_grad_()
    y = run(x)
    dy = torch.from_numpy(np.random.default_rng(WORLD.rank).normal(size=x.shape).astype("f"))
    y.backward(dy)
    torch._dynamo.reset()
    expected = oracle(x, dy)
    unbiased = expected.var * 400 / 399
    assert abs(layer.running_var - unbiased) < 1e-6 * unbiased
    assert distance(y.detach(), expected.y) < 1e-5
    assert distance(x.grad, expected.dx) < 1e-5


def test_mpi_gives_all_ranks_the_same_sums():
    """All ranks get identical sums, as the MPI standard requires, wherever their buffers begin.

    All ranks decide by these sums whether to send a second message.
    """
    random, same = np.random.default_rng(WORLD.rank), []
    for length in (5, 131, 4099, 70001):
        message = np.empty(length + 8)[WORLD.rank % 8 :][:length]
        message[:] = random.normal(1, 1, length)
        WORLD.Allreduce(MPI.IN_PLACE, message)
        same.append(bits_equal_on_all_ranks(torch.from_numpy(message)))
    assert all(same)
