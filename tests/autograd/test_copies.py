"""Copies of layers and models, and their process groups."""

from __future__ import annotations

import pickle
from copy import copy as shallow_copy
from copy import deepcopy
from functools import partial
from threading import Lock

import pytest
import torch
from mpi4py import MPI
from torch import nn

import mpisyncbn
from mpisyncbn import Communicator, SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from mpisyncbn.comm.groups import resolve
from support.models import (
    C,
    Named,
    NamedSync,
    close,
    data,
    equal,
    kinds,
    layers,
    network,
    step,
    through_pickle,
    through_torch,
)
from support.oracle import distance, local_batch, oracle, shard
from support.ranks import WORLD


@pytest.mark.parametrize(
    "copy", [deepcopy, through_torch, through_pickle, partial(through_pickle, protocol=1)]
)
@pytest.mark.parametrize("group", [None, WORLD])
def test_copies(copy, group):
    net = convert_sync_batchnorm(nn.Sequential(network(), NamedSync(C)), group)
    twin = copy(net)
    assert kinds(twin) == kinds(net)
    assert equal(twin.state_dict().values(), net.state_dict().values())
    assert not {*map(id, twin.parameters())} & {*map(id, net.parameters())}
    assert [m.process_group for m in layers(twin)] == [m.process_group for m in layers(net)]
    assert layers(revert_sync_batchnorm(twin)) == []
    assert type(twin[1]) is NamedSync
    assert len(layers(net)) == 5


def test_a_private_group_is_shared_by_copies_and_refuses_to_pickle():
    group = mpisyncbn.new_subgroups(1)
    net = convert_sync_batchnorm(network(), group)
    twin = deepcopy(net)
    with pytest.raises(
        TypeError, match=r"a private group exists only in this run.*set process_group to None"
    ):
        pickle.dumps(net)
    group.free()
    assert {m.process_group for m in layers(twin)} == {group}
    assert pickle.dumps(convert_sync_batchnorm(net))


@pytest.mark.parametrize("make", [lambda: WORLD, WORLD.Dup, Communicator, lambda: None])
def test_the_process_group_is_the_one_that_was_given(make):
    """The attribute ``process_group`` is the given object, in every way to give it and in copies.

    The attribute ``communicator`` is the Communicator that stands for it.
    """
    group = make()
    built, set_later = SyncBatchNorm(C, process_group=group), SyncBatchNorm(C)
    changed, net = Named(), network()
    set_later.process_group = group
    mpisyncbn.set_process_group(convert_sync_batchnorm(changed, MPI.COMM_SELF), group)
    convert_sync_batchnorm(net, group)
    everyone = [built, set_later, changed, *layers(net)]
    everyone += [copied for each in everyone for copied in (deepcopy(each), shallow_copy(each))]
    communicator = None if group is None else resolve(group)
    assert all(each.process_group is group for each in everyone)
    assert all(each.communicator is communicator for each in everyone)
    assert all(copied(communicator) is communicator for copied in (deepcopy, shallow_copy))
    assert "process_group=Communicator(" in repr(built) or group is None
    if group is None or group is WORLD:
        assert all(through_pickle(each).process_group == group for each in everyone)
    elif not isinstance(group, Communicator):
        with pytest.raises(TypeError, match="a private group exists only in this run"):
            pickle.dumps(built)
    with pytest.raises(TypeError, match="expected process_group to be"):
        built.process_group = nn.Parameter(torch.ones(2))
    assert built.process_group is group
    plain = vars(revert_sync_batchnorm(changed)).keys()
    assert plain == vars(Named()).keys()


def test_the_group_of_a_layer_of_torch_comes_back():
    group = Lock()  # like a process group of torch, it cannot be copied
    layer = convert_sync_batchnorm(nn.SyncBatchNorm(C, process_group=group), WORLD)
    twin = deepcopy(layer)
    with pytest.raises(TypeError, match="cannot pickle a layer that had a process_group of torch before"):
        pickle.dumps(layer)
    assert layer.process_group is twin.process_group is WORLD
    assert revert_sync_batchnorm(layer).process_group is group
    assert revert_sync_batchnorm(twin).process_group is group


def test_converting_again_hands_over_the_group():
    net, x, group = network(), data(), mpisyncbn.new_subgroups(1)
    alone = step(deepcopy(net), x)
    converted = step(convert_sync_batchnorm(convert_sync_batchnorm(net), group), x)
    group.free()
    assert {m.process_group for m in layers(net)} == {group}
    assert close(converted, alone, 1e-3)
    assert {m.process_group for m in layers(convert_sync_batchnorm(net))} == {None}


def test_a_model_goes_over_to_another_group():
    model = mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)))
    x = shard((local_batch(), 3))
    whole = model[0](x)
    mpisyncbn.set_process_group(model, MPI.COMM_SELF)
    alone = model[0](x)
    mpisyncbn.set_process_group(model, None)
    again = model[0](x)
    expected, own = oracle(x, x), oracle(x, x, comm=MPI.COMM_SELF)
    assert distance(whole, expected.y) < 1e-5
    assert distance(alone, own.y) < 1e-5
    assert torch.equal(whole, again)
    assert model[2].process_group is model[0].process_group
