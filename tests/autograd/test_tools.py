"""Converted models in helpers, of torch and others, that look for batch norms by their class."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn

from mpisyncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from support.oracle import distance, local_batch, oracle, shard
from support.ranks import WORLD

C = 3
KINDS = {nn.BatchNorm1d: (2, C), nn.BatchNorm2d: (2, C, 4, 4), nn.BatchNorm3d: (2, C, 2, 2, 2)}


def network():
    return nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Sequential(nn.BatchNorm2d(C)))


def frozen(module):
    """Replace each batch norm by a new layer, and return the module.

    timm's freeze_batch_norm_2d and detectron2's convert_frozen_batchnorm work like this.
    """
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        layer = nn.Identity()
        layer.running_mean = module.running_mean
        return layer
    for name, child in module.named_children():
        setattr(module, name, frozen(child))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_still_an_instance_of_its_old_class(kind):
    net = convert_sync_batchnorm(nn.Sequential(kind(C)))
    for layer in (net[0], copy.deepcopy(net)[0], pickle.loads(pickle.dumps(net))[0]):
        assert [k for k in KINDS if isinstance(layer, k)] == [kind]
        assert isinstance(layer, SyncBatchNorm)
        assert isinstance(layer, _BatchNorm)
        assert not isinstance(layer, nn.SyncBatchNorm)  # DistributedDataParallel refuses those on CPUs
        assert type(layer) is type(convert_sync_batchnorm(kind(C)))
        assert repr(layer) == repr(SyncBatchNorm(C))
        assert repr(type(layer)) == repr(SyncBatchNorm)
    assert net.eval()(torch.ones(KINDS[kind])).shape == KINDS[kind]
    assert type(revert_sync_batchnorm(net)[0]) is kind


def test_layers_are_frozen_in_place_and_replaced():
    net = convert_sync_batchnorm(network())
    for module in net.modules():  # the usual loop to freeze them
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    decay = [p for m in net.modules() if not isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    x = shard((local_batch(), C, 2, 2)).requires_grad_()
    before = copy.deepcopy(net.state_dict())
    net(x).sum().backward()
    replaced = frozen(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items() if key in before)
    assert [p.shape for p in decay] == [(C, C, 1, 1), (C,)]
    assert [type(m) for m in replaced.modules()][2:] == [nn.Identity, nn.Sequential, nn.Identity]


@pytest.mark.parametrize("name", ["torch", "timm", "apex", None])
def test_another_converter_does_not_take_a_layer_without_a_word(name):
    net, theirs = convert_sync_batchnorm(network()), nn.SyncBatchNorm.convert_sync_batchnorm
    if name != "torch":  # the converters of others are functions that do the same
        scope = {"__name__": f"{name}.layers", "nn": nn, "_BatchNorm": _BatchNorm}
        exec(
            "def convert_sync_batchnorm(module):\n"
            "    made = nn.SyncBatchNorm(module.num_features) if isinstance(module, _BatchNorm) else module\n"
            "    for name, child in module.named_children():\n"
            "        made.add_module(name, convert_sync_batchnorm(child))\n"
            "    return made\n",
            scope,
        )
        theirs = scope["convert_sync_batchnorm"]
    if name is None:  # a converter of the user's own is not refused
        assert isinstance(theirs(net)[1], nn.SyncBatchNorm)
        return
    message = (
        f"{name}'s convert_sync_batchnorm would replace a layer that mpisyncbn synchronizes, Sequential: 1,"
    )
    with pytest.raises(TypeError, match=re.escape(message) + rf".* \(on rank {WORLD.rank} of .*revert"):
        theirs(net)
    with pytest.raises(TypeError, match=r"synchronizes by one"):
        theirs(SyncBatchNorm(C))
    assert [isinstance(m, SyncBatchNorm) for m in (net[1], net[2][0])] == [True, True]
    assert list(net[1].children()) == []
    assert isinstance(theirs(revert_sync_batchnorm(net))[1], nn.SyncBatchNorm)


def test_statistics_of_an_averaged_model():
    net = AveragedModel(convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C))))
    batches = [shard((local_batch(), C, 2, 2), seed, mean=seed) for seed in (0, 1)]
    update_bn(batches, net)
    expected = [oracle(x, x) for x in batches]
    layer = net.module[0]
    assert distance(layer.running_mean, sum(each.mean for each in expected) / 2) < 1e-5
    assert layer.num_batches_tracked == 2
    assert layer.momentum == 0.1
