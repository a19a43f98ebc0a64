"""A layer that keeps its output in place of its input, in every way a layer is used."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mpisyncbn
from mpisyncbn import MPISyncBNError, SyncBatchNorm, sync_batch_norm
from support.memory import ACTIVATIONS, error, error_by_channel, gradients, kept, layers
from support.oracle import local_batch, shard
from support.ranks import error_of, no_exchange, together, up_to_two
from support.versions import compiles


def saved_by(call) -> tuple[Tensor, dict[int, int]]:
    """Return the result of ``call``, and the bytes of each storage that autograd keeps for it.

    Collective.
    """
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), storages


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_nothing_keeps_the_input(activation, options):
    efficient, _ = layers(activation=activation, **options)
    source = shard((local_batch(), 6, 20), 1).requires_grad_()
    x = source * 2
    storage, nbytes = weakref.ref(x.untyped_storage()), x.untyped_storage().nbytes()
    data = x.data_ptr()
    y, storages = saved_by(lambda: efficient(x))
    gc.disable()  # it would free a reference cycle
    x = None
    gone = storage() is None
    gc.enable()
    y.sum().backward()
    with together():
        assert gone
        assert data not in storages
        assert storages[y.data_ptr()] == nbytes
        assert sum(storages.values()) <= nbytes + 2 * 4 * 6


def test_channels_that_are_kept_are_all_that_is_kept():
    efficient, _ = layers(bias=[0.0, 50.0, 0.0, 0.0, 0.0, 50.0])
    x = shard((local_batch(), 6, 20), 1).requires_grad_()
    _, storages = saved_by(lambda: efficient(x))
    assert sum(storages.values()) == 4 * x.numel() + 4 * 2 * len(x) * 20 + 2 * 4 * 6


def test_a_write_into_the_output_is_noticed():
    """After an in-place ReLU on the output, say, torch raises an error in the backward pass."""
    efficient, _ = layers()
    y = efficient(shard((local_batch(), 6, 20), 1).requires_grad_())
    written = F.relu(y, inplace=True)
    problem = error_of(lambda: written.sum().backward(), RuntimeError)
    with together():
        assert "modified by an inplace operation" in str(problem)


def test_a_write_into_the_input_is_harmless():
    efficient, plain = layers()
    x = shard((local_batch(), 6, 20), 1)
    dy = shard(x.shape, 2)
    source, expected = x.clone().requires_grad_(), gradients(plain, x, dy)[1]
    before = source * 1
    y = efficient(before)
    with torch.no_grad():
        before.zero_()
    y.backward(dy)
    with together():
        assert error_by_channel(source.grad, expected) < 1e-6


@pytest.mark.parametrize("batched", [False, True])
def test_second_derivatives_are_refused_before_any_message(batched):
    efficient, plain = layers(dtype=torch.float64)
    efficient.layer_name = "net: bn"
    x = shard((local_batch(), 6, 4), 1, 0.0, torch.float64).requires_grad_()
    y = efficient(x)

    def differentiate() -> object:
        if batched:
            return torch.func.vmap(lambda dy: torch.autograd.grad(y, x, dy))(torch.ones(2, *y.shape))
        return torch.autograd.grad(y.sum(), x, create_graph=True)

    problem = error_of(differentiate, MPISyncBNError)
    plain(x)  # the ranks are still in step
    with together():
        assert "'net: bn'" in str(problem)
        assert "Set memory_efficient to False" in str(problem)


@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
def test_forward_mode_and_functorch_keep_the_input(activation):
    efficient, plain = layers(dtype=torch.float64, activation=activation, track_running_stats=False)
    x, v = (shard((local_batch(), 6, 4), seed, 0.0, torch.float64) for seed in (1, 2))
    found = []
    for layer in (efficient, plain):
        parameters = dict(layer.named_parameters())

        def loss(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, x).pow(2).mul(v).sum()

        by_func = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
        inputs = x.clone().requires_grad_()
        with forward_ad.dual_level():  # reverse over forward
            mixed = forward_ad.unpack_dual(layer(forward_ad.make_dual(inputs, v))).tangent
        (over,) = torch.autograd.grad(mixed.pow(2).sum(), inputs)
        found.append([*by_func[0].values(), by_func[1], tangent, over])
    with together():
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1], ids=["weight", "bias"])
def test_forward_mode_of_a_parameter_keeps_the_input(which):
    x = shard((local_batch(), 3, 20), 1, 2.0)
    parameters, tangent = [torch.tensor([1.0, -2.0, 0.5]), torch.ones(3)], torch.tensor([1.0, 2.0, 3.0])
    found = []
    for memory_efficient in (True, False):
        with forward_ad.dual_level():
            dual = list(parameters)
            dual[which] = forward_ad.make_dual(dual[which], tangent)
            y = sync_batch_norm(x, None, None, *dual, memory_efficient=memory_efficient)
            found.append(forward_ad.unpack_dual(y).tangent)
    with together():
        assert torch.equal(*found)


def test_the_function():
    weight, x = torch.tensor([1.0, -2.0, 1e-6]), shard((local_batch(), 3, 20), 1)
    found = []
    for memory_efficient in (True, False):
        source = x.clone().requires_grad_()
        options = {"activation": "leaky_relu(0.2)", "memory_efficient": memory_efficient}
        y = sync_batch_norm(source, None, None, weight, weight, **options)
        y.backward(shard(x.shape, 2))
        found.append((kept(y), source.grad))
    with together():
        assert [each[0] for each in found] == [[], None]
        assert error_by_channel(found[0][1], found[1][1]) < 1e-6


@up_to_two
@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
def test_compiled():
    """A compiled layer has the results of a plain one. The compiler decides what a graph keeps."""
    efficient, plain = layers(activation="leaky_relu")
    x, dy = shard((local_batch(), 6, 20), 1), shard((local_batch(), 6, 20), 2)
    compiled = torch.compile(efficient, fullgraph=True, backend="aot_eager")
    found, expected = gradients(compiled, x, dy), gradients(plain, x, dy)
    function = torch.compile(
        lambda x: sync_batch_norm(x, None, None, memory_efficient=True), fullgraph=True, backend="aot_eager"
    )
    y, expected_y = function(x), sync_batch_norm(x, None, None)
    with together():
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))
        assert torch.allclose(y, expected_y, atol=1e-6)


@no_exchange
@pytest.mark.parametrize("training", [True, False])
def test_refusals(training):
    x = torch.randn(3, 2, 4)
    stats = torch.zeros(2), torch.ones(2)
    refused = ["relu", "silu", "gelu", "elu", "hardswish", "leaky_relu(0.0)", "leaky_relu(-0.5)"]
    for activation in refused:
        given = {"activation": activation, "memory_efficient": True}
        for call in (
            partial(SyncBatchNorm, 2, **given),
            partial(setattr, SyncBatchNorm(2, memory_efficient=True), "activation", activation),
            partial(setattr, SyncBatchNorm(2, activation=activation), "memory_efficient", True),
            partial(sync_batch_norm, x, *stats, training=training, **given),
        ):
            with pytest.raises(ValueError, match=re.escape(f"got {activation!r}")):
                call()
    layer = SyncBatchNorm(2, memory_efficient=True).train(training)
    layer.layer_name = "net: bn"
    for call in (
        lambda: layer(x, x),
        lambda: sync_batch_norm(x, *stats, training=training, residual=x, memory_efficient=True),
    ):
        with pytest.raises(ValueError, match="expected no residual with memory_efficient, got one"):
            call()
    with pytest.raises(TypeError, match="expected memory_efficient to be True or False, got 1"):
        layer.memory_efficient = 1
    assert layer.num_batches_tracked == 0
    layer.activation = "leaky_relu(0.2)"
    assert layer.memory_efficient


@pytest.mark.parametrize("frozen", [["x"], ["weight"], ["bias"], ["weight", "bias"], ["x", "bias"]], ids=str)
def test_frozen_tensors(frozen):
    found = []
    for layer in layers(activation="leaky_relu", bias=[0.0, 50.0, 0.0, 1.0, 2.0, 0.5]):
        x = shard((local_batch(), 6, 20), 1).requires_grad_()
        tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
        for name in frozen:
            tensors[name].requires_grad_(False)
        layer(x).backward(shard(x.shape, 2))
        found.append([tensor.grad for tensor in tensors.values()])
    with together():
        for name, ours, theirs in zip(tensors, *found, strict=True):
            assert (ours is None) == (theirs is None) == (name in frozen)
            assert ours is None or error(ours, theirs) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    efficient, plain = layers(activation="leaky_relu", bias=[0.0, 50.0, 0.0, 0.0, 0.0, 1.0])
    x, dy = shard((local_batch(), 6, 20), 1), shard((local_batch(), 6, 20), 2)
    expected = gradients(plain, x, dy)
    x.requires_grad_()
    checkpoint(efficient, x, use_reentrant=reentrant).backward(dy)
    with together():
        assert error_by_channel(x.grad, expected[1]) < 1e-6
        assert torch.equal(efficient.running_mean, plain.running_mean)


def test_saved_on_cpu_and_a_second_backward_pass():
    """A hook for saved tensors may return a copy of the output."""
    efficient, plain = layers(activation="leaky_relu")
    x, dy = shard((local_batch(), 6, 20), 1), shard((local_batch(), 6, 20), 2)
    expected = gradients(plain, x, dy)
    x.requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y = efficient(x)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    assert error_by_channel(x.grad, 2 * expected[1]) < 1e-6


@no_exchange
def test_state_of_a_layer():
    layer = SyncBatchNorm(3, memory_efficient=True)
    plain = SyncBatchNorm(3)
    copied, loaded = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert copied.memory_efficient
    assert loaded.memory_efficient
    assert "memory_efficient=True" in repr(layer)
    assert "memory_efficient" not in repr(plain)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    mpisyncbn.revert_sync_batchnorm(layer)
    assert not hasattr(layer, "memory_efficient")


@no_exchange
def test_conversion_leaves_out_layers_that_refuse():
    net = nn.Sequential(
        nn.BatchNorm1d(3), nn.LeakyReLU(), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1)
    )
    mpisyncbn.convert_sync_batchnorm(net, fuse_relu=True, memory_efficient=True)
    assert [net[i].memory_efficient for i in (0, 2, 4)] == [True, False, True]
    mpisyncbn.convert_sync_batchnorm(net)  # without the keyword, nothing changes
    assert net[0].memory_efficient
    mpisyncbn.revert_sync_batchnorm(net)
    assert not any("memory_efficient" in vars(layer) for layer in net)


@no_exchange
def test_conversion_leaves_out_registered_forwards():
    """A registered forward may end in an activation that cannot be undone."""

    class NormRelu(nn.BatchNorm1d):
        def forward(self, x):
            return F.relu(super().forward(x))

    mpisyncbn.register_conversion(NormRelu, lambda layer, batch_norm, x: batch_norm(x, None, "relu"))
    layer = mpisyncbn.convert_sync_batchnorm(NormRelu(3), memory_efficient=True)
    assert not layer.memory_efficient
    layer.eval()(torch.randn(2, 3, 4))


@no_exchange
def test_memory_efficient_layers_that_are_fused_later():
    """The order of two conversions does not matter."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.LeakyReLU(), nn.BatchNorm1d(3), nn.ReLU())
    mpisyncbn.convert_sync_batchnorm(net, memory_efficient=True)
    mpisyncbn.convert_sync_batchnorm(net, fuse_activation=True)
    assert [(net[i].activation, net[i].memory_efficient) for i in (0, 2)] == [
        ("leaky_relu", True),
        ("relu", False),
    ]
    net.eval()(torch.randn(2, 3, 4))


def test_a_fused_leaky_relu_in_place():
    """A block of nnU-Net keeps one tensor of the size of the convolution's output, not two."""
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.LeakyReLU(inplace=True), nn.Conv1d(3, 1, 1))
    plain = mpisyncbn.convert_sync_batchnorm(copy.deepcopy(net))
    mpisyncbn.convert_sync_batchnorm(net, fuse_activation=True, memory_efficient=True)
    x = shard((local_batch(), 2, 40), 1)
    y, storages = saved_by(lambda: net(x))
    found = [gradients(each, x, y.detach())[1:] for each in (net, plain)]
    with together():
        assert sum(nbytes == 4 * len(x) * 3 * 40 for nbytes in storages.values()) == 1
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_evaluation_and_update_bn():
    efficient, plain = layers(bias=[0.0, 50.0, 0.0, 0.0, 0.0, 1.0])
    x, dy = shard((local_batch(), 6, 20), 1), shard((local_batch(), 6, 20), 2)
    found = []
    for layer in (efficient, plain):
        mpisyncbn.update_bn([x, x * 2], layer)
        layer.eval()
        found.append([*gradients(layer, x, dy), layer.running_mean, layer.running_var])
    with together():
        assert all(map(torch.equal, *found))
