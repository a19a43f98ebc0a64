"""Layers with masks, over ranks: the batch has only the values where the mask is true."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import mpisyncbn
from mpisyncbn import SyncBatchNorm, functional, kernels, sync_batch_norm
from mpisyncbn.comm.groups import resolve
from mpisyncbn.kernels.activation import activate
from support.masks import ACTIVATIONS, RANK, TOLERANCE, data, is_0_elsewhere, nothing, parameters, rows
from support.oracle import distance, layouts, oracle, shard
from support.ranks import WORLD, no_exchange, together

SHAPES = [(3,), (4, 7), (5, 8, 8), (2, 3, 4, 5)]  # rows, padded sequences, grids, volumes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_whole_batch_of_true_positions(shape, dtype):
    layer = SyncBatchNorm(shape[0], dtype=dtype)
    with torch.no_grad():
        for mine, value in zip(layer.parameters(), parameters(shape[0], dtype), strict=True):
            mine.copy_(value)
    x, _, dy, mask = data(shape, dtype)
    x.requires_grad_()
    before = resolve(None).exchanges
    y = layer(x, mask=mask)
    forward = resolve(None).exchanges - before
    y.backward(dy)
    backward = resolve(None).exchanges - before - forward
    expected = oracle(rows(x, mask), rows(dy, mask), layer.weight, layer.bias)
    sums = WORLD.allreduce(torch.stack([p.grad.double() for p in layer.parameters()]))
    tolerance = TOLERANCE[dtype]
    unbiased = expected.var * expected.count / (expected.count - 1)
    with together():
        assert (forward, backward) == (1, 1)
        assert distance(rows(y, mask), expected.y) < tolerance
        assert is_0_elsewhere(y, mask)
        assert distance(rows(x.grad, mask), expected.dx, expected.dx_scale) < tolerance * 2
        assert is_0_elsewhere(x.grad, mask)
        assert distance(sums, torch.stack([expected.dweight, expected.dbias]), expected.sum_scale) < tolerance
        assert distance(layer.running_mean, 0.1 * expected.mean, expected.var.sqrt()) < tolerance
        assert distance(layer.running_var, 0.9 + 0.1 * unbiased) < tolerance


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("native", [True, False])
def test_residual_and_activation_in_every_layout(activation, with_residual, native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels, "native", lambda: None)
    x, residual, dy, mask = data((5, 8, 9), torch.float32)
    weight, bias = parameters(5, torch.float32)
    found = []
    for laid in layouts(x).values():
        leaves = [laid.clone().requires_grad_(), residual.clone().requires_grad_()]
        more = leaves[1] if with_residual else None
        y = sync_batch_norm(
            leaves[0], None, None, weight, bias, activation=activation, residual=more, mask=mask
        )
        asked = [*leaves[: 1 + with_residual], weight, bias]
        found.append((y, torch.autograd.grad(y, asked, dy)))
    wide = [rows(v, mask).double().requires_grad_() for v in (x, residual)]
    wide += [v.detach().double().requires_grad_() for v in (weight, bias)]
    z = sync_batch_norm(wide[0], None, None, *wide[2:])
    expected = activate(z + wide[1] if with_residual else z, mpisyncbn.activations.activation_of(activation))
    asked = wide if with_residual else [wide[0], *wide[2:]]
    gradients = torch.autograd.grad(expected, asked, rows(dy, mask).double())
    with together():
        for y, ours in found:
            assert distance(rows(y, mask), expected) < 5e-6
            assert is_0_elsewhere(y, mask)
            of_values = 1 + with_residual
            for mine, theirs in zip(ours[:of_values], gradients[:of_values], strict=True):
                assert is_0_elsewhere(mine, mask)
                assert distance(rows(mine, mask), theirs) < 2e-5
            for mine, theirs in zip(ours[of_values:], gradients[of_values:], strict=True):
                assert distance(mine, theirs) < 2e-5


def test_derivatives_of_every_order_over_ranks():
    """Derivatives where the mask is true are those of a batch that has only these values."""
    shape, results, clean = (3, 4), [], []
    for activation in (None, "silu"):
        for masked in (True, False):
            x, residual, dy, mask = data(shape)
            if not masked:
                x, residual, dy = (rows(v, mask) for v in (x, residual, dy))
            leaves = [x.requires_grad_(), residual.requires_grad_(), *parameters(3, torch.float64)]
            options = {"activation": activation, "mask": mask if masked else None}

            def layer(x, residual, weight, bias, options=options):
                return sync_batch_norm(x, None, None, weight, bias, residual=residual, **options)

            y = layer(*leaves)
            first = torch.autograd.grad(y, leaves, dy, create_graph=True)
            squares = y.pow(3).sum() + sum(each.square().sum() for each in first)
            second = torch.autograd.grad(squares, leaves)
            with forward_ad.dual_level():
                tangents = [torch.nan_to_num(v.detach() * 0 + 1, 5.0) for v in leaves]
                duals = [forward_ad.make_dual(*v) for v in zip(leaves, tangents, strict=True)]
                tangent = forward_ad.unpack_dual(layer(*duals)).tangent
            by_func = torch.func.grad(
                lambda x, leaves=leaves, layer=layer: layer(x, *leaves[1:]).pow(3).sum()
            )
            third = by_func(x.detach())
            values = [y, tangent, third, *first[:2], *second[:2]]
            vectors = [*first[2:], *second[2:]]
            if masked:
                clean += [is_0_elsewhere(v, mask) for v in values]
                values = [rows(v, mask) for v in values]
            results.append([v.detach() for v in (*values, *vectors)])
    with together():
        assert all(clean)
        for ours, theirs in zip(results[::2], results[1::2], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert distance(a, b, b.abs().max().item() + 1e-3 if b.numel() else None) < 1e-9


@no_exchange
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck_and_gradgradcheck(activation):
    group = mpisyncbn.Communicator(mpisyncbn.comm.runtime.mpi().COMM_SELF)
    mask = torch.tensor([[[True, False, True]], [[False, True, True]]])
    x, residual = (shard((2, 2, 3), seed, dtype=torch.float64).requires_grad_() for seed in (1, 2))

    def function(x, weight, bias, residual):
        options = {"process_group": group, "activation": activation, "residual": residual, "mask": mask}
        return sync_batch_norm(x, None, None, weight, bias, **options)

    arguments = x, *parameters(2, torch.float64), residual
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_a_mask_on_some_ranks_only():
    x, _, dy, mask = data((4, 6))
    everything = torch.ones_like(mask)
    if RANK % 2:
        x, dy, mask = torch.nan_to_num(x, 1.0), torch.nan_to_num(dy, 1.0, 1.0, 1.0), everything
    x.requires_grad_()
    y = sync_batch_norm(x, None, None, mask=None if RANK % 2 else mask)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = oracle(rows(x, mask), rows(dy, mask))
    with together():
        assert distance(rows(y, mask), expected.y) < 1e-12
        assert distance(rows(dx, mask), expected.dx, expected.dx_scale) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_counts_anywhere(dtype):
    layer, other = SyncBatchNorm(3, dtype=dtype), SyncBatchNorm(3, dtype=dtype)
    x = torch.full((2, 3, 4), math.nan, dtype=dtype, requires_grad=True)
    y = layer(x, mask=nothing(2, 4))
    y.sum().backward()
    other(torch.zeros(0, 3, 4, dtype=dtype)).sum().backward()
    with together():
        assert (y == 0).all()
        assert (x.grad == 0).all()
        for ours, theirs in zip(layer.buffers(), other.buffers(), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)


def test_one_value_in_the_group_has_no_variance():
    mask = nothing(2, 4)
    mask[0, 0, 0] = RANK == 0
    expected = r"expected more than 1 value per channel over the whole group .* got 1, with "
    with pytest.raises(ValueError, match=expected):
        SyncBatchNorm(3)(torch.ones(2, 3, 4), mask=mask)
    mask[0, 0, 0] = True
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        SyncBatchNorm(3, track_running_stats=False).eval()(torch.ones(2, 3, 4), mask=mask)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_functional(kind, dtype):
    x, _, dy, mask = data((4, 6), getattr(torch, np.dtype(dtype).name))
    weight, bias = (v.detach() for v in parameters(4, x.dtype))
    arrays = [v if kind == "torch" else v.numpy() for v in (x, dy, mask, weight, bias)]
    y, stats = functional.batch_norm_forward(arrays[0], *arrays[3:], mask=arrays[2])
    dx, dweight, dbias = functional.batch_norm_backward(
        arrays[1], arrays[0], stats, arrays[3], mask=arrays[2]
    )
    assert type(y) is type(dx) is type(arrays[0])
    y, dx, dweight, dbias, var = map(torch.as_tensor, (y, dx, dweight, dbias, stats.var))
    expected = oracle(rows(x, mask), rows(dy, mask), weight, bias)
    sums = WORLD.allreduce(torch.stack([dweight, dbias]))
    tolerance = TOLERANCE[x.dtype]
    with together():
        assert stats.count == expected.count
        assert distance(var, expected.var) < max(tolerance, 1e-6)
        assert distance(rows(y, mask), expected.y) < tolerance
        assert is_0_elsewhere(y, mask)
        assert distance(rows(dx, mask), expected.dx, expected.dx_scale) < tolerance * 2
        assert is_0_elsewhere(dx, mask)
        assert distance(sums, torch.stack([expected.dweight, expected.dbias]), expected.sum_scale) < tolerance


WRONG = {
    "expected mask of dtype bool, got float32": torch.ones(2, 1, 4),
    r"expected mask of shape \(2, 1, 4\), .* got \(2, 4\), of 2 dimensions": torch.ones(2, 4).bool(),
    r"got \(2, 3, 4\), of 3 dimensions": torch.ones(2, 3, 4).bool(),
    r"got \(1, 1, 4\), of 3 dimensions": torch.ones(1, 1, 4).bool(),
    r"got \(2, 1, 1\), .*nothing is broadcast": torch.ones(2, 1, 1).bool(),
    "expected mask on cpu, where the input is, got one on meta": torch.ones(2, 1, 4, device="meta").bool(),
}


@no_exchange
@pytest.mark.parametrize("words", WRONG)
def test_errors(words):
    x, mask, layer = torch.ones(2, 3, 4), WRONG[words], SyncBatchNorm(3)
    vectors = layer.running_mean, layer.running_var
    calls = [
        lambda: layer.train()(x, mask=mask),
        lambda: layer.eval()(x, mask=mask),
        lambda: sync_batch_norm(x, *vectors, mask=mask),
        lambda: sync_batch_norm(x, *vectors, training=False, mask=mask),
        lambda: functional.batch_norm_forward(x, mask=mask),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "on rank" in str(caught.value)


@no_exchange
def test_values_that_are_no_masks():
    x = torch.ones(2, 3, 4)
    for odd in ([[True]], np.ones((2, 1, 4), bool), "mask", torch.ones(2, 1, 4).bool().to_sparse()):
        for call in (SyncBatchNorm(3), SyncBatchNorm(3).eval()):
            with pytest.raises(TypeError, match="expected mask to be"):
                call(x, mask=odd)
    with pytest.raises(TypeError, match="expected mask to be"):
        functional.batch_norm_forward(x.numpy(), mask=torch.ones(2, 1, 4).bool())
    with pytest.raises(TypeError, match="positional"):
        SyncBatchNorm(3)(x, None, torch.ones(2, 1, 4).bool())
