"""A layer that adds a residual and applies an activation has the results of separate operations."""

from __future__ import annotations

import copy
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F

from mpisyncbn import SyncBatchNorm, convert_sync_batchnorm, sync_batch_norm
from support.activations import ACTIVATIONS, TORCHS, TWO, far_from_kinks
from support.oracle import distance, local_batch, shard
from support.ranks import WORLD, once, together, up_to_two
from support.versions import compiles

# The largest errors allowed: results are rounded to the dtype once.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}
OPTIONS = [{"affine": False}, {"bias": False}]
with_and_without_residual = pytest.mark.parametrize("with_residual", [False, True])
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def layers(activation, channels=5, dtype=torch.float32, **options):
    """Return a fused layer, and a plain one with the same parameters."""
    fused = SyncBatchNorm(channels, activation=activation, dtype=dtype, **options)
    with torch.no_grad():
        if fused.weight is not None:
            fused.weight.copy_(shard((channels,), 1))
        if fused.bias is not None:
            fused.bias.copy_(shard((channels,), 2))
    plain = copy.deepcopy(fused)
    plain.activation = None
    return fused, plain


def inputs(dtype=torch.float32, seed=0, shape=(5, 6, 7)):
    shape = (local_batch(), *shape)
    return (
        shard(shape, seed + 3, 1.0, dtype).requires_grad_(),
        shard(shape, seed + 4, 0.0, dtype).requires_grad_(),
        shard(shape, seed + 5, 0.0, dtype),
    )


def added(layer, x, residual=None):
    y = layer(x)
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@with_and_without_residual
@pytest.mark.parametrize(
    ("activation", "options"),
    [*((each, {}) for each in ACTIVATIONS), *((each, options) for each in TWO for options in OPTIONS)],
    ids=str,
)
def test_training(activation, options, with_residual, dtype):
    fused, plain = layers(activation, dtype=dtype, **options)
    x, residual, dy = inputs(dtype)
    wide_x, wide_residual = (v.detach().double().requires_grad_() for v in (x, residual))
    plain = plain.double()
    residuals = (residual, wide_residual) if with_residual else (None, None)
    y = fused(x, residuals[0])
    z = added(plain, wide_x, residuals[1])
    expected = TORCHS[activation](z)
    # Near a kink, rounding decides the side, and either is right.
    far = far_from_kinks(z, activation, 1e-5)
    dy = dy * far
    y.backward(dy)
    expected.backward(dy.double())
    tolerance = TOLERANCE[dtype]
    assert far.double().mean() > 0.99
    assert y.dtype == dtype
    assert distance(y, expected) < tolerance
    assert distance(x.grad, wide_x.grad) < tolerance
    if with_residual:
        assert residual.grad.dtype == dtype
        assert distance(residual.grad, wide_residual.grad) < tolerance
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert distance(ours.grad, theirs.grad) < tolerance * 4
    assert distance(fused.running_var, plain.running_var) < tolerance
    assert fused.num_batches_tracked == 1


@with_and_without_residual
@every_activation
def test_channels_last_and_empty_ranks(activation, with_residual):
    fused, plain = layers(activation)
    for batch in (local_batch(), 0 if WORLD.rank else 3):
        x = shard((batch, 5, 4, 3), 1).contiguous(memory_format=torch.channels_last).requires_grad_()
        residual = shard((batch, 5, 4, 3), 2) if with_residual else None
        y = fused(x, residual)
        z = x.detach().clone().requires_grad_()
        expected = TORCHS[activation](added(plain, z, residual))
        y.sum().backward()
        expected.sum().backward()
        assert y.shape == x.shape
        assert batch == 0 or y.is_contiguous(memory_format=torch.channels_last)
        assert batch == 0 or distance(y, expected) < 1e-6
        assert batch == 0 or distance(x.grad, z.grad, z.grad.abs().max() + 1) < 1e-5


@up_to_two
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning:torch"
)  # torch warns about itself
@pytest.mark.usefixtures("fresh_compiler")
@compiles
@pytest.mark.parametrize(
    ("backend", "chosen"),
    [
        ("aot_eager", list(zip(TWO, (True, False), strict=True))),
        pytest.param(
            "inductor",
            list(itertools.product(ACTIVATIONS, (False, True))),
            marks=[pytest.mark.full, once("the machine code of activations does not depend on the ranks")],
        ),
    ],
    ids=["aot_eager", "inductor"],
)
def test_compiled(backend, chosen):
    """Layers with and without a residual are compiled in one graph.

    The case that is marked full has all activations, and compiles them to machine code.
    """
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor compiles C++, and there is no g++")
    fused = {case: layers(case[0])[0] for case in chosen}
    eager = copy.deepcopy(fused)

    def results(layers):
        def function(x, residual):
            return [layer(x, residual if given else None) for (_, given), layer in layers.items()]

        forward = function
        if layers is fused:
            forward = torch.compile(function, fullgraph=True, backend=backend)
        x, residual, dy = inputs()
        ys = forward(x, residual)
        torch.autograd.backward(ys, [dy * far_from_kinks(zs[case], case[0], 1e-5) for case in chosen])
        parameters = [parameter.grad for layer in layers.values() for parameter in layer.parameters()]
        buffers = [layer.running_var for layer in layers.values()]
        return [*ys, x.grad, residual.grad, *parameters, *buffers]

    x, residual, _ = inputs()
    zs = {case: added(layers(case[0])[1], x, residual if case[1] else None) for case in chosen}
    found, expected = results(fused), results(eager)
    with together():
        for ours, theirs in zip(found, expected, strict=True):
            assert distance(ours, theirs) < 1e-5


@every_activation
def test_evaluation(activation):
    fused, plain = layers(activation)
    x, residual, _ = inputs()
    fused.eval(), plain.eval()
    for r in (None, residual):
        assert torch.equal(fused(x, r), TORCHS[activation](added(plain, x, r)))
    y = sync_batch_norm(
        x, fused.running_mean, fused.running_var, training=False, activation=activation, residual=residual
    )
    expected = TORCHS[activation](F.batch_norm(x, fused.running_mean, fused.running_var) + residual)
    assert torch.equal(y, expected)


def test_a_lazy_layer_takes_a_residual():
    layer = convert_sync_batchnorm(torch.nn.LazyBatchNorm2d())
    x, residual, _ = inputs()
    assert distance(layer(x, residual), SyncBatchNorm(5)(x) + residual) < 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_bad_residuals(training):
    x, _, _ = inputs()
    layer = SyncBatchNorm(5).train(training)
    for bad in (x[:, :3], x.double(), x.to("meta")):
        with pytest.raises(ValueError, match=r"expected residual like the input"):
            layer(x, bad)
    with pytest.raises(TypeError, match=r"expected residual to be a tensor, got float"):
        layer(x, 1.0)
    with together():
        assert layer.num_batches_tracked == 0
