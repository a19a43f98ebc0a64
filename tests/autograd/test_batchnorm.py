"""SyncBatchNorm compared with torch's BatchNorm on the whole batch, and as a module of torch."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mpisyncbn
from support.oracle import HAS_BIAS, bits_equal_on_all_ranks, distance, layouts, local_batch, oracle, shard
from support.ranks import WORLD, together

LOCAL = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


WITHOUT_BIAS = pytest.param(
    {"bias": False},
    id="{'bias': False}",
    marks=pytest.mark.skipif(not HAS_BIAS, reason="the layers of this torch have no such argument"),
)


def whole_batch(x: torch.Tensor) -> torch.Tensor:
    return torch.cat(WORLD.allgather(x.detach()))


@pytest.mark.parametrize("inner", [(3,), (4, 7), (5, 6, 6), (3, 4, 2, 5), (2, 2, 3, 2, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 1.0},
        {"affine": False},
        WITHOUT_BIAS,
        {"track_running_stats": False},
        {"eps": 0.1},
    ],
    ids=str,
)
def test_like_torch_on_the_whole_batch(inner, options):
    """Outputs, gradients and buffers are those of one process that has the whole batch.

    Three training steps have uneven batches. An evaluation follows.
    """
    ours = mpisyncbn.SyncBatchNorm(inner[0], **options)
    theirs = LOCAL.get(len(inner) + 1, nn.BatchNorm3d)(inner[0], **options).double()
    if len(inner) > 4:
        theirs._check_input_dim = lambda input: None
    for step in range(3):
        n = local_batch(2 + step)
        x, dy = shard((n, *inner), step, 2.0).requires_grad_(), shard((n, *inner), 50 + step)
        y = ours(x)
        y.backward(dy)
        expected = oracle(x, dy, ours.weight, ours.bias, ours.eps)
        theirs(whole_batch(x).double())
        assert distance(y.detach(), expected.y) < 1e-5
        assert distance(x.grad, expected.dx, dy / (expected.var + ours.eps).sqrt().min()) < 1e-5
        assert x.grad.stride() == x.stride()
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(reference)
    for name, value in reference.items():
        assert mine[name].shape == value.shape
        assert mine[name].dtype == (torch.int64 if name == "num_batches_tracked" else torch.float32)
        assert distance(mine[name], value) < 1e-6, name
    ours.eval()
    theirs.eval()
    exchanges = exchanges_done()
    if ours.track_running_stats:
        assert distance(ours(x).detach(), theirs(x.detach().double())) < 1e-5
    else:  # then it uses this rank's own batch, as torch does
        assert (
            distance(ours(x).detach(), nn.functional.batch_norm(x.detach(), None, None, training=True)) < 1e-5
        )
    assert exchanges_done() == exchanges


def exchanges_done() -> int:
    from mpisyncbn.comm.groups import resolve

    return resolve(None).exchanges


def test_one_exchange_each_way():
    x = shard((local_batch(), 3, 4, 4), 1).requires_grad_()
    for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        layer = mpisyncbn.SyncBatchNorm(3, **options)
        counts = [exchanges_done()]
        y = layer(x)
        counts.append(exchanges_done())
        y.sum().backward()
        counts.append(exchanges_done())
        y = layer(x.detach())
        counts.append(exchanges_done())
        if layer.affine:
            y.sum().backward()  # the gradients of the parameters are this rank's own sums
        counts.append(exchanges_done())
        assert [b - a for a, b in itertools.pairwise(counts)] == [1, 1, 1, 0]


def test_running_statistics_are_the_same_bits_everywhere_after_100_uneven_steps():
    layer = mpisyncbn.SyncBatchNorm(7)
    for step in range(100):
        n = (step * 7 + WORLD.rank * 5) % 4 + (WORLD.rank == 0)
        layer(shard((n, 7, 3), step, float(step)))
    same = [bits_equal_on_all_ranks(layer.running_mean), bits_equal_on_all_ranks(layer.running_var)]
    assert all(same)
    assert layer.num_batches_tracked == 100


@pytest.mark.parametrize("ratio", [0.0, 1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_accuracy_in_float32(ratio, memory_format):
    """Errors are below 1e-6 of the variance, and below 1e-5 of the largest y and dx."""
    shape = (4 + WORLD.rank, 16, 28, 28)
    x = shard(shape, 1, ratio).contiguous(memory_format=memory_format).requires_grad_()
    dy = shard(shape, 2).contiguous(memory_format=memory_format)
    layer = mpisyncbn.SyncBatchNorm(16, momentum=1.0)
    y = layer(x)
    y.backward(dy)
    expected = oracle(x, dy)
    unbiased = expected.var * expected.count / (expected.count - 1)
    assert ((layer.running_var - unbiased).abs() / unbiased).max() < 1e-6
    assert distance(y.detach(), expected.y) < 1e-5
    assert distance(x.grad, expected.dx) < 1e-5
    assert y.is_contiguous(memory_format=memory_format)
    assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["float32", "half", "none"])
def test_half_precision(dtype, parameters):
    layer = mpisyncbn.SyncBatchNorm(5, affine=parameters != "none", track_running_stats=parameters != "none")
    layer = layer.to(dtype) if parameters == "half" else layer
    x, dy = (
        shard((local_batch(), 5, 6, 6), 1, 3.0, dtype).requires_grad_(),
        shard((local_batch(), 5, 6, 6), 2, dtype=dtype),
    )
    y = layer(x)
    y.backward(dy)
    layer.eval()
    evaluated = layer(x)
    expected = oracle(x, dy)
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    assert y.dtype == x.grad.dtype == evaluated.dtype == dtype
    assert distance(y.detach(), expected.y) < tolerance
    assert distance(x.grad, expected.dx) < tolerance
    if parameters == "float32":
        assert (
            distance(layer.running_var, 0.9 + 0.1 * expected.var * expected.count / (expected.count - 1))
            < 1e-6
        )
        assert layer.weight.grad.dtype == torch.float32


def test_autocast():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), mpisyncbn.SyncBatchNorm(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    for p in net.parameters():
        p.data = torch.linspace(-0.3, 0.4, p.numel()).view(p.shape)
    x = shard((local_batch(), 3, 8, 8), 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    half = net[1].running_var.clone()
    net[1].reset_running_stats()
    net(x)
    assert net[1].weight.grad.dtype == torch.float32
    assert distance(half, net[1].running_var) < 1e-2


def test_empty_batches():
    layer, only = mpisyncbn.SyncBatchNorm(3), mpisyncbn.SyncBatchNorm(3)
    before = copy.deepcopy(layer.state_dict())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(0, 3, 4, 4, dtype=dtype, requires_grad=True)
        layer(x).sum().backward()  # no rank has data
        assert x.grad.shape == x.shape
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    n = 4 if WORLD.rank == WORLD.size - 1 else 0
    x, dy = shard((n, 3, 4, 4), 1).requires_grad_(), shard((n, 3, 4, 4), 2)
    only(x).backward(dy)
    expected = oracle(x, dy)
    same = bits_equal_on_all_ranks(only.running_var)
    assert same
    assert distance(x.grad, expected.dx) < 1e-5
    assert distance(only.running_var, 0.9 + 0.1 * expected.var * 64 / 63) < 1e-6


@pytest.mark.parametrize(
    "momentum",
    [
        *(torch.tensor(0.25, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
        nn.Parameter(torch.tensor(0.25), requires_grad=False),
        np.float32(0.25),
    ],
    ids=lambda m: f"{type(m).__name__} {m.dtype}",
)
def test_a_momentum_that_is_a_tensor(momentum):
    """The layer, its copies and the functions take a 0-d momentum like a number, as torch's do."""
    layer, expected = mpisyncbn.SyncBatchNorm(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    pickled, running = pickle.loads(pickle.dumps(layer)), (torch.zeros(3), torch.ones(3))
    copied, updated = copy.deepcopy(layer), (torch.zeros(3), torch.ones(3))
    for seed in (1, 2):
        x = shard((local_batch(), 3, 4), seed, 2.0)
        for each in (layer, copied, pickled):
            each(x)
        mpisyncbn.sync_batch_norm(x, *running, momentum=momentum)
        _, stats = mpisyncbn.functional.batch_norm_forward(x)
        mpisyncbn.functional.update_running_stats(*updated, stats, momentum)
        expected(whole_batch(x))
    assert distance(layer.running_var, expected.running_var) < 1e-6
    assert list(layer.state_dict()) == list(expected.state_dict())
    for other in (copied, pickled):
        assert torch.equal(other.running_var, layer.running_var)
    for mean, var in (running, updated):
        assert distance(mean, layer.running_mean) < 1e-6
        assert distance(var, layer.running_var) < 1e-6


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_without_a_count(momentum):
    """Without num_batches_tracked, statistics change as torch's: not if momentum is None."""
    layer, expected = mpisyncbn.SyncBatchNorm(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    layer.num_batches_tracked = expected.num_batches_tracked = None
    x = shard((4, 3), 1, 2.0)
    layer(x)
    expected(torch.cat(WORLD.allgather(x)))
    for name, value in expected.named_buffers():
        assert distance(layer.get_buffer(name), value) < 1e-6


def test_a_batch_that_is_not_finite_is_kept_out_everywhere():
    mpisyncbn.running_stats._warn_not_finite.cache_clear()
    layer = mpisyncbn.SyncBatchNorm(3)
    layer(shard((4, 3), 1))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = shard((4, 3), 2)
    if WORLD.rank == WORLD.size - 1:
        x[1, 1] = float("inf")
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer(shard((4, 3), 3))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, WITHOUT_BIAS, {"track_running_stats": False}], ids=str
)
def test_state_dict_both_ways(options):
    ours, theirs = mpisyncbn.SyncBatchNorm(4, **options), nn.BatchNorm2d(4, **options)
    ours(shard((local_batch(), 4, 2, 2), 1))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    fresh = mpisyncbn.SyncBatchNorm(4, **options)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])
    old = {k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"}
    fresh.load_state_dict(old, strict=True)  # older checkpoints lack it and have no version


def test_the_constructor_is_torchs():
    ours = inspect.signature(mpisyncbn.SyncBatchNorm).parameters
    theirs = inspect.signature(nn.SyncBatchNorm).parameters
    more = {"activation", "memory_efficient"} | (set() if HAS_BIAS else {"bias"})
    assert [(p.name, p.default, p.kind) for p in ours.values() if p.name not in more] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    layer = mpisyncbn.SyncBatchNorm(3, device="meta", dtype=torch.float64)
    assert layer.weight.device.type == "meta"
    assert layer.running_var.dtype == torch.float64
    assert "3, eps=1e-05, momentum=0.1" in repr(layer)
    assert "process_group=Communicator" in repr(mpisyncbn.SyncBatchNorm(3, process_group=WORLD))


def test_reset_without_a_bias():
    layer = mpisyncbn.SyncBatchNorm(3, bias=False)
    layer(shard((local_batch(), 3, 4), 1, 5.0))
    with torch.no_grad():
        layer.weight.fill_(7.0)
    layer.reset_parameters()
    with together():
        assert layer.bias is None
        assert layer.weight.tolist() == [1.0] * 3
        assert layer.running_mean.tolist() == [0.0] * 3
        assert list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]


def test_parameters_are_trained_like_the_whole_batch():
    """Twenty steps of SGD in float64 give the parameters of one process with the whole batch."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    ours = mpisyncbn.convert_sync_batchnorm(copy.deepcopy(net))
    sgd = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (net, ours)]
    for step in range(20):
        x = shard((3 + WORLD.rank, 4), step, dtype=torch.float64)
        whole = whole_batch(x)
        for model, batch, optimizer in ((net, whole, sgd[0]), (ours, x, sgd[1])):
            optimizer.zero_grad()
            loss = (model(batch) - batch.sum(1, keepdim=True).sin()).square().sum() / len(whole)
            loss.backward()
            if model is ours:
                for p in model.parameters():
                    p.grad = torch.from_numpy(WORLD.allreduce(p.grad.numpy()))
            optimizer.step()
    for name, value in net.state_dict().items():
        assert distance(ours.state_dict()[name], value, value.abs().max().double() + 1) < 1e-10, name


@given(
    sizes=st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(lambda s: s[0] > 1),
    inner=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["contiguous", "channels last", "strided"]),
    affine=st.booleans(),
)
def test_any_split_shape_dtype_and_layout(sizes, inner, dtype, layout, affine):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = mpisyncbn.SyncBatchNorm(inner[0], momentum=1.0, affine=affine, dtype=wide)
    shape = (sizes[WORLD.rank % 4], *inner)
    x, dy = shard(shape, 3, 1.0, dtype), shard(shape, 4, 0.0, dtype)
    x = layouts(x)[layout].requires_grad_()
    y = layer(x)
    y.backward(dy)
    expected = oracle(x, dy)
    unbiased = expected.var * expected.count / (expected.count - 1)
    # With few values the variance may be almost 0, which makes dx large.
    scale = (1 / (expected.var.min() + 1e-5).sqrt()) * 10
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    with together():
        assert y.shape == x.shape
        assert y.dtype == x.grad.dtype == dtype
        assert distance(layer.running_var, unbiased, unbiased + 1e-3) < 1e-5
        assert distance(y.detach(), expected.y, torch.tensor(3.0)) < tolerance
        assert distance(x.grad, expected.dx, scale) < tolerance
