"""ReLU and a residual in the same passes: the same as one after the other, in every way a layer is used."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpisyncbn
from mpisyncbn import SyncBatchNorm, sync_batch_norm
from support.oracle import distance, local_batch, shard
from support.ranks import WORLD, together, up_to_two
from support.versions import compiles

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def layers(channels=5, dtype=torch.float32, **options):
    """A fused layer and one that is not, alike."""
    fused = SyncBatchNorm(channels, activation="relu", dtype=dtype, **options)
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


def one_after_the_other(layer, x, residual=None):
    y = layer(x)
    return F.relu(y if residual is None else y + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_training(dtype, with_residual, options):
    fused, plain = layers(dtype=dtype, **options)
    x, residual, dy = inputs(dtype)
    wide_x, wide_residual = (v.detach().double().requires_grad_() for v in (x, residual))
    plain = plain.double()
    residuals = (residual, wide_residual) if with_residual else (None, None)
    y = fused(x, residuals[0])
    expected = one_after_the_other(plain, wide_x, residuals[1])
    # Within rounding of the kink either answer is right.
    sure = (expected > 0) == (y.detach() > 0)
    few = (~sure).double().mean()
    dy = dy * sure
    y.backward(dy)
    expected.backward(dy.double())
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    assert few < (0.02 if dtype == torch.bfloat16 else 1e-3)
    assert y.dtype == dtype
    assert distance(y, expected) < tolerance
    assert distance(x.grad, wide_x.grad) < tolerance
    if with_residual:
        assert torch.equal(residual.grad.double(), wide_residual.grad)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert distance(ours.grad, theirs.grad) < tolerance * 4
    assert distance(fused.running_var, plain.running_var) < tolerance
    assert fused.num_batches_tracked == 1


@pytest.mark.parametrize("with_residual", [False, True])
def test_channels_last_and_empty_ranks(with_residual):
    fused, plain = layers()
    for batch in (local_batch(), 0 if WORLD.rank else 3):
        x = shard((batch, 5, 4, 3), 1).contiguous(memory_format=torch.channels_last).requires_grad_()
        residual = shard((batch, 5, 4, 3), 2) if with_residual else None
        y = fused(x, residual)
        z = x.detach().clone().requires_grad_()
        expected = one_after_the_other(plain, z, residual)
        y.sum().backward()
        expected.sum().backward()
        assert y.shape == x.shape
        assert batch == 0 or y.is_contiguous(memory_format=torch.channels_last)
        assert batch == 0 or distance(y, expected) < 1e-6
        assert batch == 0 or distance(x.grad, z.grad, z.grad.abs().max() + 1) < 1e-5


@pytest.mark.parametrize("with_residual", [False, True])
def test_second_derivatives_and_forward_mode(with_residual):
    fused, plain = layers(dtype=torch.float64)
    x, residual, dy = inputs(torch.float64)
    residual = residual if with_residual else None
    found = []
    for layer in (fused, lambda x, r: one_after_the_other(plain, x, r)):
        (gradient,) = torch.autograd.grad(layer(x, residual), x, dy, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(2).sum(), x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), dy)
            tangent = torch.autograd.forward_ad.unpack_dual(layer(dual, residual)).tangent
        found.append((gradient.detach(), second, tangent.detach()))
    for ours, theirs in zip(*found, strict=True):
        assert distance(ours, theirs) < 1e-10


@up_to_two
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning:torch"
)  # of torch, about itself
@compiles
def test_compiled():
    fused, plain = layers()
    x, residual, dy = inputs()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    y = compiled(x, residual)
    y.backward(dy)
    ours = x.grad.clone(), residual.grad.clone()
    x.grad = residual.grad = None
    expected = one_after_the_other(plain, x, residual)
    expected.backward(dy)
    assert distance(y, expected) < 1e-5
    assert distance(ours[0], x.grad) < 1e-5
    assert torch.equal(ours[1], residual.grad)


def test_evaluation():
    fused, plain = layers()
    x, residual, _ = inputs()
    fused.eval(), plain.eval()
    for r in (None, residual):
        assert torch.equal(fused(x, r), one_after_the_other(plain, x, r))
    y = sync_batch_norm(
        x, fused.running_mean, fused.running_var, training=False, activation="relu", residual=residual
    )
    expected = F.relu(F.batch_norm(x, fused.running_mean, fused.running_var) + residual)
    assert torch.equal(y, expected)


def test_an_activation_is_kept_and_shown():
    fused, plain = layers()
    assert "activation='relu'" in repr(fused)
    assert "activation" not in repr(plain)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.activation == "relu"
    assert list(fused.state_dict()) == list(nn.BatchNorm2d(5).state_dict())


def test_conversion_fuses_nothing_by_itself():
    net = mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()))
    assert net[0].activation is None
    net[0].activation = "relu"
    assert net[0](inputs()[0]).min() == 0
    with pytest.raises(TypeError, match="cannot revert layers whose activation would be lost: 0"):
        mpisyncbn.revert_sync_batchnorm(net)
    net[0].activation = None
    reverted = mpisyncbn.revert_sync_batchnorm(net)
    assert not hasattr(reverted[0], "activation")


def test_an_attribute_of_that_name_is_kept():
    bn = nn.BatchNorm2d(5)
    bn.activation = "a note of somebody"
    layer = mpisyncbn.convert_sync_batchnorm(bn)
    assert layer.activation is None
    assert layer(inputs()[0]).min() < 0
    assert mpisyncbn.revert_sync_batchnorm(layer).activation == "a note of somebody"
    bn.activation = nn.ReLU()
    with pytest.raises(TypeError, match="something named activation: 0"):
        mpisyncbn.convert_sync_batchnorm(nn.Sequential(bn))
    assert type(bn) is nn.BatchNorm2d


def test_a_lazy_layer_takes_a_residual():
    layer = mpisyncbn.convert_sync_batchnorm(nn.LazyBatchNorm2d())
    x, residual, _ = inputs()
    assert distance(layer(x, residual), SyncBatchNorm(5)(x) + residual) < 1e-6


def test_conversion_fuses_on_request():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(5)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5), nn.Tanh()),
        nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(inplace=True)),
        nn.Sequential(shared, nn.ReLU()),
        nn.Sequential(shared, nn.Sigmoid()),
        nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()),
    )
    net[4][1].register_forward_hook(lambda *_: None)
    before = [type(module) for module in net.modules()]
    keys = list(net.state_dict())
    plain = mpisyncbn.convert_sync_batchnorm(copy.deepcopy(net))
    fused = mpisyncbn.convert_sync_batchnorm(net, fuse_relu=True)
    fused_layers = [name for name, module in fused.named_modules() if getattr(module, "activation", None)]
    x = shard((local_batch(), 5, 3, 3), 1)
    assert fused_layers == ["0.1", "1.0"]
    assert distance(fused(x), plain(x)) < 1e-6
    assert distance(copy.deepcopy(fused)(x), plain(x)) < 1e-6
    assert list(fused.state_dict()) == keys
    again = mpisyncbn.convert_sync_batchnorm(fused, fuse_relu=True)
    assert distance(again(x), plain(x)) < 1e-6
    assert [type(module) for module in mpisyncbn.revert_sync_batchnorm(fused).modules()] == before


@pytest.mark.parametrize("training", [True, False])
def test_bad_arguments(training):
    x, _, _ = inputs()
    layer = SyncBatchNorm(5).train(training)
    with pytest.raises(ValueError, match=r"expected activation to be one of 'relu', .* or None, got 'tanh'"):
        layer.activation = "tanh"
    with pytest.raises(ValueError, match=r"expected activation to be one of 'relu', .* or None, got 'tanh'"):
        SyncBatchNorm(5, activation="tanh")
    with pytest.raises(ValueError, match=r"expected activation to be one of 'relu'"):
        sync_batch_norm(x, layer.running_mean, layer.running_var, training=training, activation="tanh")
    for bad in (x[:, :3], x.double(), x.to("meta")):
        with pytest.raises(ValueError, match=r"expected residual like the input"):
            layer(x, bad)
    with pytest.raises(TypeError, match=r"expected residual to be a tensor, got float"):
        layer(x, 1.0)
    with together():
        assert layer.num_batches_tracked == 0
