"""Layers give the same results under the ``stream`` transport as under ``host``.

They run on the stand-in's streams, with Python between the kernels and not in one native call.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mpisyncbn
from mpisyncbn import functional
from mpisyncbn.kernels import generic, masked
from support import masks
from support.device import GPU, cuda, needs_triton
from support.oracle import distance, layouts, local_batch, oracle, shard
from support.ranks import WORLD, several, up_to_two
from support.stream_device import needs_standin, pretend_stream, stream_group

pytestmark = [needs_standin, pytest.mark.skipif(GPU, reason="scripts/gpu_check has its own")]
BARS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(params=[generic])
def groups(request, monkeypatch):
    """A group with the stream transport and one with ``host``, on the same device and kernels."""
    pretend_stream(monkeypatch, waits=True)
    for module in ("autograd.fused", "functional"):
        monkeypatch.setattr(
            f"mpisyncbn.{module}.kernels_for",
            lambda x, mask=None: request.param if mask is None else masked.with_mask(masked, mask),
        )
    made = [stream_group()]
    monkeypatch.setenv("MPISYNCBN_TRANSPORT", "host")
    made.append(mpisyncbn.Communicator().ready())
    yield made
    for group in made:
        group.free()


def train(
    group: Any, options: Any, x: torch.Tensor, dy: torch.Tensor, residual: Any = None, mask: Any = None
) -> Any:
    """Return all results of two training steps, and the group's number of exchanges. Collective."""
    torch.manual_seed(0)
    layer = mpisyncbn.SyncBatchNorm(x.shape[1], process_group=group, **options)
    if layer.affine:
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
    found = []
    for scale in (1.0, 2.0):
        leaves = [
            None if each is None else (each.detach() * scale).requires_grad_() for each in (x, residual)
        ]
        y = layer(*leaves) if mask is None else layer(*leaves, mask=mask)
        y.backward(dy)
        found += [y.detach(), *(each.grad for each in leaves if each is not None)]
    found += [each.grad for each in layer.parameters()]
    return found + [each.double() for each in layer.buffers() if each is not None], group.exchanges


def same(groups: Any, dtype: torch.dtype, *arguments: Any) -> None:
    (found, exchanges), (expected, of_host) = (train(group, *arguments) for group in groups)
    assert len(found) == len(expected)
    assert exchanges == of_host
    assert groups[0].stream.slots > 0  # the stream worker did the exchanges
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert distance(ours, theirs) < BARS[dtype]


@up_to_two
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float64},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-2},
        {"affine": False},
        {"track_running_stats": False},
        {"activation": "relu"},
        {"activation": "leaky_relu(0.1)", "dtype": torch.float64},
        {"activation": "silu"},
        {"activation": "gelu", "affine": False},
        {"activation": "hardswish", "momentum": None},
    ],
    ids=str,
)
def test_a_layer(groups, options):
    """Both groups give the same results in every memory layout, with and without a residual."""
    dtype = options.get("dtype") or torch.float32
    shape = (local_batch(), 3, 4, 5)
    x, dy, residual = (shard(shape, seed, mean, dtype) for seed, mean in ((1, 5.0), (2, 0.5), (3, 0.0)))
    for layout in layouts(x).values():
        same(groups, dtype, options, layout, dy)
    same(groups, dtype, options, x, dy, residual)


def test_half_precision_and_a_mask_and_an_empty_rank(groups):
    x, dy = (shard((local_batch(), 3, 4), seed, 1.0, torch.bfloat16) for seed in (1, 2))
    same(groups, torch.bfloat16, {}, x, dy)
    x, _, dy, mask = masks.data((3, 4, 5), torch.float32)
    same(groups, torch.float32, {"activation": "leaky_relu"}, x.detach(), dy, None, mask)
    n = 0 if WORLD.rank == 0 and WORLD.size > 1 else 3
    same(groups, torch.float32, {}, shard((n, 3, 4), 1), shard((n, 3, 4), 2))


@needs_triton
@pytest.mark.parametrize("groups", [cuda], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_the_whole_batch(groups, dtype):
    layer = mpisyncbn.SyncBatchNorm(3, process_group=groups[0], dtype=dtype, momentum=1.0)
    x, dy = (shard((local_batch(), 3, 4), seed, mean, dtype) for seed, mean in ((1, 5.0), (2, 0.5)))
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    expected, bar = oracle(x, dy), 1e-11 if dtype == torch.float64 else 1e-5
    assert distance(y.detach(), expected.y) < bar
    assert distance(leaf.grad, expected.dx, expected.dx_scale) < bar
    assert distance(layer.running_mean, expected.mean) < bar
    assert distance(layer.running_var, expected.var * expected.count / (expected.count - 1)) < bar


def test_running_statistics_are_left_alone(groups):
    """Running statistics ignore a batch that has NaN, overflows their dtype, or is empty."""
    layer = mpisyncbn.SyncBatchNorm(3, process_group=groups[0])
    x = shard((local_batch(), 3, 4), 1)
    layer(x)
    before = [each.clone() for each in layer.buffers()]
    for bad in (x * torch.nan, x * 1e25, x[:0]):
        layer(bad)
    assert all(torch.equal(*each) for each in zip(layer.buffers(), before, strict=True))


def by_checkpoint(group, x):
    layer = mpisyncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64)
    checkpoint(layer, x, use_reentrant=False).pow(3).sum().backward()
    return x.grad


def in_another_thread(group, x):
    """Run backward in another thread, as autograd does for a device."""
    layer = mpisyncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64)
    thread = threading.Thread(target=layer(x).pow(3).sum().backward)
    thread.start()
    thread.join()
    return x.grad


def twice(group, x):
    layer = mpisyncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64)
    (slope,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), x)[0]


def by_function(group, x):
    y, stats = functional.batch_norm_forward(x, process_group=group)
    dx, *_ = functional.batch_norm_backward(y * y, x, stats, process_group=group)
    running = torch.zeros(3).double(), torch.ones(3).double()
    functional.update_running_stats(*running, stats, 0.5)
    return torch.cat([y.flatten(), dx.flatten(), stats.mean, stats.var, *running])


def sync_batch_norm(group, x):
    running = torch.zeros(3).double(), torch.ones(3).double()
    y = mpisyncbn.sync_batch_norm(x, *running, training=True, process_group=group)
    y.pow(3).sum().backward()
    return torch.cat([x.grad.flatten(), *running])


def update_bn(group, x):
    model = torch.nn.Sequential(mpisyncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64))
    mpisyncbn.update_bn([x.detach(), 2 * x.detach()], model)
    return torch.cat([model[0].running_mean, model[0].running_var])


@pytest.mark.parametrize(
    "use",
    [by_checkpoint, in_another_thread, twice, by_function, sync_batch_norm, update_bn],
    ids=lambda u: u.__name__,
)
def test_uses(use, groups):
    shape = (local_batch(), 3, 4)
    found, expected = (use(group, shard(shape, 1, 2.0, torch.float64).requires_grad_()) for group in groups)
    assert distance(found, expected) < 1e-12


def test_another_group(groups):
    """After set_process_group, a backward pass stays with the group of its forward pass."""
    layer = mpisyncbn.SyncBatchNorm(3, process_group=groups[0], dtype=torch.float64)
    x, counts = shard((local_batch(), 3, 4), 1, 2.0, torch.float64).requires_grad_(), []
    for group in (groups[1], groups[0]):
        y = layer(x)
        mpisyncbn.set_process_group(layer, group)
        y.pow(3).sum().backward()
        counts.append([each.exchanges for each in groups])
    alone = mpisyncbn.Communicator(WORLD.Split(WORLD.rank))
    mpisyncbn.set_process_group(layer, alone)
    y = layer(x.detach())
    assert counts == [[2, 0], [2, 2]]
    assert distance(y.mean((0, 2)), torch.zeros(3), 1.0) < 1e-12


@several
def test_a_mismatch_of_layers(groups):
    """A mismatched call returns NaN and keeps running statistics. The next call raises."""
    layers = [mpisyncbn.SyncBatchNorm(3, process_group=groups[0]) for _ in range(2)]
    x = shard((local_batch(), 3, 4), 1)
    for layer in layers:
        layer(x)
    mine = layers[WORLD.rank % 2]
    before = [each.clone() for each in mine.buffers()]
    y, raised = mine(x), ""
    kept = [each.clone() for each in mine.buffers()]
    try:
        layers[0](x)
    except mpisyncbn.CollectiveMismatchError as error:
        raised = str(error)
    after = layers[0](x)
    assert y.isnan().all()
    assert all(torch.equal(*each) for each in zip(kept, before, strict=True))
    assert "in exchange number 3 of this communicator they made different ones" in raised
    assert after.isfinite().all()
