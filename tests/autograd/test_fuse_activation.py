"""Conversion lets layers apply the activations that follow them. Reverting puts these back."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from mpisyncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from mpisyncbn.convert.fusing import FusedActivation
from support.activations import ACTIVATIONS, TORCHS
from support.models import kinds
from support.oracle import distance, local_batch, shard
from support.ranks import no_exchange, together


def images():
    return shard((local_batch(), 5, 3, 3), 1)


def fused_layers(net):
    """Return the activation of each layer that applies one, as a text, by the name of the layer."""
    layers = net.named_modules()
    return {name: layer.activation for name, layer in layers if getattr(layer, "activation", None)}


class InOrder(nn.Sequential):
    """A subclass of nn.Sequential that inherits its forward, like torchvision's blocks."""


class Otherwise(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) + self[0](x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("container", [nn.Sequential, InOrder])
def test_every_activation_there_and_back(container, inplace):
    torch.manual_seed(0)
    modules = [copy.deepcopy(TORCHS[each]) for each in ACTIVATIONS]
    for module in modules:
        # torch has no gradient of an in-place leaky ReLU with a negative slope
        if hasattr(module, "inplace") and getattr(module, "negative_slope", 0) >= 0:
            module.inplace = inplace
    net = nn.Sequential(*(container(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), module) for module in modules))
    classes, keys = kinds(net), list(net.state_dict())
    plain = convert_sync_batchnorm(copy.deepcopy(net))
    fused = convert_sync_batchnorm(net, fuse_activation=True)
    texts = fused_layers(fused)
    x, given = images().requires_grad_(), images().requires_grad_()
    expected, y = plain(x), fused(given)
    expected.square().sum().backward()
    y.square().sum().backward()
    plain.eval(), fused.eval()
    evaluated, expected_evaluated = fused(given), plain(x)
    trains = [module.training for module in revert_sync_batchnorm(net).modules()]
    with together():
        assert texts == {f"{i}.1": text for i, text in enumerate(ACTIVATIONS)}
        assert distance(y, expected) < 1e-5
        assert distance(given.grad, x.grad, x.grad.abs().max() + 1) < 1e-4
        assert distance(evaluated, expected_evaluated) < 1e-5
        assert list(fused.state_dict()) == keys
        assert kinds(net) == classes
        assert [block[2] for block in net] == modules
        assert all(ours is module for ours, module in zip((b[2] for b in net), modules, strict=True))
        assert not any(trains), "it has been in evaluation in the meantime"


def test_fuse_relu_is_relu_alone():
    net = nn.Sequential()
    for each in ("relu", "silu", "leaky_relu"):
        net.append(nn.Sequential(nn.BatchNorm2d(5), copy.deepcopy(TORCHS[each])))
    convert_sync_batchnorm(net, fuse_relu=True)
    assert fused_layers(net) == {"0.0": "relu"}
    convert_sync_batchnorm(net, fuse_relu=True, fuse_activation=True)
    assert fused_layers(net) == {"0.0": "relu", "1.0": "silu", "2.0": "leaky_relu"}
    classes = [nn.ReLU, nn.SiLU, nn.LeakyReLU]
    assert [type(block[1]) for block in revert_sync_batchnorm(net)] == classes


def test_an_input_that_others_read_and_an_activation_in_place():
    """A fused layer does not write into its input, even if its activation was in-place."""

    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.BatchNorm2d(5), nn.SiLU(inplace=True))

        def forward(self, x):
            z = 2 * x
            return self.block(z) + z

    net = Shortcut()
    plain, x = convert_sync_batchnorm(copy.deepcopy(net)), images()
    fused = convert_sync_batchnorm(net, fuse_activation=True)
    y, expected = fused(x), plain(x)
    with together():
        assert fused_layers(fused) == {"block.0": "silu"}
        assert distance(y, expected) < 1e-6


def test_one_activation_in_several_places():
    """One module follows two layers and a convolution, also outside of the nn.Sequential."""
    torch.manual_seed(0)
    act = nn.LeakyReLU(0.1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = act
            self.block = nn.Sequential(
                nn.BatchNorm2d(5), act, nn.Conv2d(5, 5, 1), act, nn.BatchNorm2d(5), act
            )

        def forward(self, x):
            return self.act(self.block(x) - 1)

    net = Net()
    plain, x = convert_sync_batchnorm(copy.deepcopy(net)), images()
    fused = convert_sync_batchnorm(net, fuse_activation=True)
    twin = copy.deepcopy(fused)
    y, y_of_twin, expected = fused(x), twin(x), plain(x)
    with together():
        assert fused_layers(fused) == {"block.0": "leaky_relu(0.1)", "block.4": "leaky_relu(0.1)"}
        assert fused.act is fused.block[3] is act
        assert distance(y, expected) < 1e-5
        assert distance(y_of_twin, expected) < 1e-5
    for each in (fused, twin):
        revert_sync_batchnorm(each)
        assert each.act is each.block[1] is each.block[3] is each.block[5]
    assert fused.act is act


def test_layers_that_are_not_fused():
    """Conversion fuses no layer in two places, with hooks, or with an activation of its own.

    It also leaves alone activations with hooks, of another class, or with a forward of their own,
    and containers that do not run like nn.Sequential.
    """
    shared, hooked, derived = nn.BatchNorm2d(5), nn.BatchNorm2d(5), type("Derived", (nn.SiLU,), {})
    hooked.register_forward_hook(lambda *_: None)
    own, seen = nn.SiLU(), nn.SiLU()
    own.forward = lambda x: -x
    seen.register_full_backward_hook(lambda *_: None)
    inside = nn.Sequential(nn.BatchNorm2d(5), nn.SiLU())
    backwards = nn.Sequential(nn.BatchNorm2d(5), nn.SiLU())
    backwards.forward = lambda x: backwards[0](backwards[1](x))
    net = nn.ModuleList(
        [
            nn.Sequential(shared, nn.SiLU()),
            nn.Sequential(shared, nn.Sigmoid()),
            nn.Sequential(hooked, nn.SiLU()),
            nn.Sequential(nn.BatchNorm2d(5), seen),
            nn.Sequential(nn.BatchNorm2d(5), own),
            nn.Sequential(nn.BatchNorm2d(5), derived()),
            Otherwise(nn.BatchNorm2d(5), nn.SiLU()),
            nn.Sequential(SyncBatchNorm(5, activation="silu"), nn.SiLU()),
            nn.Sequential(nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.Identity(), nn.ReLU6()),
            nn.Sequential(nn.Sequential(nn.BatchNorm2d(5)), nn.SiLU()),
            inside,
            nn.Sequential(inside),
            backwards,
        ]
    )
    before = kinds(net)
    convert_sync_batchnorm(net, fuse_activation=True)
    assert fused_layers(net) == {"7.0": "silu"}
    assert not [each for each in net.modules() if isinstance(each, FusedActivation)]
    assert [kind for kind in kinds(net) if not issubclass(kind, SyncBatchNorm)] == [
        kind for kind in before if not issubclass(kind, nn.modules.batchnorm._BatchNorm)
    ]


@no_exchange
@pytest.mark.parametrize("new", ["silu", None])
def test_an_activation_that_was_set_after_fusing_is_not_lost(new):
    relu = nn.ReLU()
    net = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(5), relu), fuse_activation=True)
    net[0].activation, twin = new, copy.deepcopy(net)
    lost = f"activation would be lost: 0 ({new}, where reverting restores relu) (on rank"
    with pytest.raises(TypeError, match=re.escape(lost)):
        revert_sync_batchnorm(net)
    assert net[0].activation == new
    net[1], net[0].activation = nn.SiLU(), None  # the cure that the message names
    assert kinds(revert_sync_batchnorm(net)) == [nn.Sequential, nn.BatchNorm2d, nn.SiLU]
    twin[0].activation = "relu"
    assert kinds(revert_sync_batchnorm(twin)) == [nn.Sequential, nn.BatchNorm2d, nn.ReLU]


@no_exchange
def test_global_hooks_see_everything():
    net = nn.Sequential(nn.BatchNorm2d(5), nn.SiLU())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        convert_sync_batchnorm(net, fuse_activation=True)
    finally:
        handle.remove()
    assert fused_layers(net) == {}


@no_exchange
def test_models_that_were_pickled_with_a_relu():
    """Pickles of older versions still load.

    They refer to FusedActivation as FusedReLU, or to it and ``rebuild`` in other modules.
    """
    net = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()), fuse_activation=True)
    stand_in = vars(net[1])
    stand_in["_relu"] = stand_in.pop("_replaced")
    del stand_in["_activation"]
    saved = pickle.dumps(net, protocol=0)
    for rebuild, fused in (
        (b"convert\n_rebuild\n", b"convert\nFusedReLU\n"),
        (b"mixed_class\nrebuild\n", b"fusing\nFusedReLU\n"),
        (b"mixed_class\nrebuild\n", b"fusing\nFusedActivation\n"),
    ):
        older = saved
        for name, was in (b"convert\nrebuild\n", rebuild), (b"convert\nFusedActivation\n", fused):
            assert older.count(name) == 1
            older = older.replace(name, was)
        loaded = pickle.loads(older)
        assert loaded(images()).min() == 0
        reverted = revert_sync_batchnorm(copy.deepcopy(loaded))
        assert kinds(reverted) == [nn.Sequential, nn.BatchNorm2d, nn.ReLU]


def test_conversion_fuses_nothing_by_itself():
    net = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()))
    assert net[0].activation is None
    net[0].activation = "relu"
    assert net[0](images()).min() == 0
    with pytest.raises(TypeError, match="cannot revert layers whose activation would be lost: 0"):
        revert_sync_batchnorm(net)
    net[0].activation = None
    reverted = revert_sync_batchnorm(net)
    assert not hasattr(reverted[0], "activation")
