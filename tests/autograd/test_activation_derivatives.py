"""Derivatives of layers that end in an activation: of every order, in both modes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from mpisyncbn import SyncBatchNorm, convert_sync_batchnorm, init_process_group, sync_batch_norm
from mpisyncbn.comm.groups import resolve
from support.across_ranks import ONE_EMPTY, UNEVEN, inputs, whole_batch_function
from support.activations import ACTIVATIONS, TORCHS, far_from_kinks
from support.oracle import distance, local_batch, shard
from support.ranks import WORLD, together, up_to_two

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
with_and_without_residual = pytest.mark.parametrize("with_residual", [False, True])


@with_and_without_residual
@pytest.mark.parametrize(
    "activation",
    # Finite differences take long. One activation is enough to test more ranks.
    [each if each == "silu" else pytest.param(each, marks=up_to_two) for each in ACTIVATIONS],
)
def test_gradcheck_and_gradgradcheck_over_ranks(activation, with_residual):
    """With a residual, some ranks have no samples."""
    sizes = ONE_EMPTY if with_residual else UNEVEN
    arguments = inputs(sizes, 2, 2)[: 4 if with_residual else 3]
    z = whole_batch_function(sizes)(*arguments).detach()
    function = whole_batch_function(sizes, activation)
    with together():
        assert far_from_kinks(z, activation, 1e-3).all(), "finite differences are wrong across a kink"
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@with_and_without_residual
@every_activation
def test_gradients_at_the_kinks(activation, with_residual):
    """If the activation's input is exactly at a kink, the gradient is the one that torch takes.

    With weights of 0, as some networks have at the start, the input of the activation is the bias.
    """
    places = torch.tensor([-3.0, 0.0, 3.0])
    layer = SyncBatchNorm(3, activation=activation)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(places)
    x = shard((local_batch(), 3, 4), 1).requires_grad_()
    found = []
    for twice in (False, True):  # by the kernels, then by differentiable operations
        y = layer(x, torch.zeros_like(x) if with_residual else None)
        found += torch.autograd.grad(y.sum(), layer.bias, create_graph=twice)
    z = places.clone().requires_grad_()
    TORCHS[activation](z).sum().backward()
    slopes = torch.tensor([0.0, 0.5, 1.0]) if activation == "hardswish" else z.grad  # older torch: 1.5 at 3
    with together():
        for each in found:
            assert torch.allclose(each, slopes * (x.numel() / 3), rtol=1e-5, atol=1e-5)


@with_and_without_residual
@every_activation
def test_forward_mode_and_torch_func(activation, with_residual):
    """A layer's derivatives are those of a layer without an activation, then torch's.

    tests/autograd/test_autograd.py tests a layer without an activation.
    """
    x, residual, t, u = (shard((local_batch(), 3, 4), seed, dtype=torch.float64) for seed in range(4))
    weight, bias = (torch.tensor([1.0, -0.7, 2.0]).double() * k for k in (1, 0.3))
    names = ["x", "weight", "bias", "residual"][: 4 if with_residual else 3]
    values = [x, weight, bias, residual][: len(names)]
    tangents = [t, bias, weight, u][: len(names)]

    def fused(x, weight, bias, residual=None):
        return sync_batch_norm(x, None, None, weight, bias, activation=activation, residual=residual)

    def parts(x, weight, bias, residual=None):
        y = sync_batch_norm(x, None, None, weight, bias)
        return TORCHS[activation](y if residual is None else y + residual)

    def tangent(function):
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, values, tangents)
            return forward_ad.unpack_dual(function(*duals)).tangent

    def loss(function):
        return lambda *values: function(*values).pow(3).sum()

    numbers = tuple(range(len(names)))
    found = []
    for function in (fused, parts):
        gradient = torch.func.grad(loss(function), argnums=numbers)
        found.append(
            [
                tangent(function),
                torch.func.jvp(function, tuple(values), tuple(tangents))[1],
                *gradient(*values),
                torch.func.jvp(lambda x, g=gradient: g(x, *values[1:])[0], (x,), (t,))[1],  # Hessian * t
                *torch.func.vjp(function, *values)[1](u),
            ]
        )
    with together():
        for number, (ours, theirs) in enumerate(zip(*found, strict=True)):
            assert distance(ours, theirs, theirs.abs().max() + 1) < 1e-10, number


@with_and_without_residual
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_activation
def test_second_derivatives_of_half_input(activation, dtype, with_residual):
    """Second derivatives of half-precision input are computed in float32, like first ones."""
    x, dy, v, added = (shard((local_batch(), 3, 4, 4), seed, dtype=dtype) for seed in range(1, 5))
    results = []
    for wide in (False, True):
        leaf, grad, r = (each.double() if wide else each for each in (x, dy, added))
        leaf, r = leaf.clone().requires_grad_(), r if with_residual else None
        z = sync_batch_norm(leaf, None, None)
        far = far_from_kinks(z.detach() if r is None else z.detach() + r, activation, 2e-2)
        y = sync_batch_norm(leaf, None, None, activation=activation, residual=r)
        (dx,) = torch.autograd.grad(y, leaf, grad * (results[0][2] if wide else far), create_graph=True)
        (second,) = torch.autograd.grad((dx.double() * v.double()).sum(), leaf)
        results.append((dx.detach(), second, far))
    with together():
        assert results[0][1].dtype == dtype
        for ours, theirs in zip(results[0][:2], results[1][:2], strict=True):
            assert distance(ours, theirs, theirs.abs().max() + 1) < (
                4e-2 if dtype == torch.bfloat16 else 1e-2
            )


@with_and_without_residual
@every_activation
def test_autocast(activation, with_residual):
    """A linear layer gives the layer half-precision input. The parameters are in float32."""
    torch.manual_seed(0)
    linear, layer = nn.Linear(4, 3), SyncBatchNorm(3, activation=activation)
    x, added = shard((local_batch(), 4), 1), shard((local_batch(), 3), 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        z = linear(x)
        y = layer(z, added if with_residual else None)
    y.float().square().sum().backward()
    wide = z.detach().double().requires_grad_()
    plain = SyncBatchNorm(3).double()(wide)
    expected = TORCHS[activation](plain + added.double() if with_residual else plain)
    with together():
        assert y.dtype == torch.bfloat16
        assert layer.weight.grad.dtype == torch.float32
        assert distance(y, expected, expected.abs().max() + 1) < 1e-2
        assert linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
@with_and_without_residual
@every_activation
def test_checkpoints(activation, with_residual, use_reentrant):
    layer = SyncBatchNorm(3, activation=activation)
    again = copy.deepcopy(layer)
    x, added = shard((local_batch(), 3, 4), 1).requires_grad_(), shard((local_batch(), 3, 4), 2)
    residual = added.requires_grad_() if with_residual else None
    inputs = [x, residual] if with_residual else [x]
    before = resolve(None).exchanges
    layer(x, residual).square().sum().backward()
    expected = [each.grad for each in inputs]
    for each in inputs:
        each.grad = None
    y = torch.utils.checkpoint.checkpoint(again, *inputs, use_reentrant=use_reentrant)
    y.square().sum().backward()
    with together():
        assert resolve(None).exchanges - before == 5
        assert all(torch.equal(each.grad, grad) for each, grad in zip(inputs, expected, strict=True))
        assert all(map(torch.equal, again.state_dict().values(), layer.state_dict().values()))


@up_to_two
def test_distributed_data_parallel():
    """The gradients are those of one process that has the whole batch.

    The model has a block for each activation, which conversion fuses.
    """
    init_process_group()
    try:
        torch.manual_seed(0)
        blocks = [(nn.Linear(4, 4), nn.BatchNorm1d(4), TORCHS[each]) for each in ACTIVATIONS]
        whole = nn.Sequential(*itertools.chain(*blocks)).double()
        net = convert_sync_batchnorm(copy.deepcopy(whole), fuse_activation=True)
        fused = [layer.activation for layer in net if isinstance(layer, SyncBatchNorm)]
        ddp = nn.parallel.DistributedDataParallel(net)
        sizes = [3 + rank for rank in range(WORLD.size)]
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(sum(sizes), 4, dtype=torch.float64, generator=generator)
        mine = x[sum(sizes[: WORLD.rank]) :][: sizes[WORLD.rank]]
        (ddp(mine).pow(2).sum() * WORLD.size).backward()  # DDP divides by the number of ranks
        whole(x).pow(2).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    with together():
        assert fused == ACTIVATIONS
        for ours, theirs in zip(net.parameters(), whole.parameters(), strict=True):
            assert distance(ours.grad, theirs.grad, theirs.grad.abs().max() + 1e-3) < 1e-9
