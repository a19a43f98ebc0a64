"""Records of layers and groups are dropped with them, unless another rank still needs the group."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from mpisyncbn import (
    Communicator,
    SyncBatchNorm,
    convert_sync_batchnorm,
    functional,
    revert_sync_batchnorm,
)
from mpisyncbn.comm import layer_names, unreferenced
from mpisyncbn.comm.groups import resolve
from mpisyncbn.liveness import rank_status
from support.oracle import distance, local_batch, oracle, shard
from support.ranks import WORLD, no_exchange, several

RANK, SIZE = WORLD.rank, WORLD.size
MANY = 1500  # several times the number of names that are kept


def test_the_names_of_dropped_layers_are_forgotten():
    """Ranks may drop layers at different times, and build layers that others do not have."""
    group, x = Communicator(), shard((local_batch(), 3))
    first = SyncBatchNorm(3, momentum=1.0, process_group=group)
    first(x)
    alive = len(layer_names._layers)
    held = []
    for number in range(MANY):
        layer = SyncBatchNorm(3, process_group=group)
        layer(x)
        if WORLD.rank == 0 and number % 2:
            held.append(layer)
            copy.deepcopy(layer)
        elif number % 10 == 0:
            revert_sync_batchnorm(layer)
    live = len(held)
    first(x + 1)
    last = group.name_of(first._key), group.name_of(layer._key)
    assert last == tuple(f"the layer first used in exchange number {n}" for n in (1, MANY + 1))
    assert len(group._names) <= 2 * (live + 2 * layer_names._KEPT)
    assert len(layer_names._layers) <= alive + live + 1
    assert distance(first.running_mean, oracle(x + 1, x).mean) < 1e-5


@no_exchange
def test_a_layer_that_is_reverted_and_converted_again_and_again():
    group, layer = Communicator(MPI.COMM_SELF), nn.BatchNorm1d(3)
    alive = len(layer_names._layers)
    for _ in range(MANY):
        group.name_of(convert_sync_batchnorm(layer, group)._key)
        revert_sync_batchnorm(layer)
    assert len(group._names) <= 2 * layer_names._KEPT
    assert len(layer_names._layers) == alive


@no_exchange
def test_the_names_of_all_that_live_are_kept():
    group = Communicator(MPI.COMM_SELF)
    layers = [SyncBatchNorm(1, process_group=group) for _ in range(MANY)]
    before = [group.name_of(layer._key) for layer in layers]
    SyncBatchNorm(1, process_group=group)
    assert [group.name_of(layer._key) for layer in layers] == before
    del layers
    for _ in range(MANY):
        group.name_of(SyncBatchNorm(1)._key)
    assert len(group._names) <= 2 * (MANY + layer_names._KEPT)
    for _ in range(2 * MANY):
        group.name_of(SyncBatchNorm(1)._key)
    assert len(group._names) <= 4 * layer_names._KEPT


@no_exchange
def test_a_layer_that_fails_leaves_no_more_behind():
    group = Communicator(MPI.COMM_SELF)
    for _ in range(MANY):
        with pytest.raises(ValueError, match="expected more than 1 value"):
            SyncBatchNorm(1, process_group=group)(torch.ones(1, 1))
    assert len(group._names) <= 2 * layer_names._KEPT


@no_exchange
def test_a_class_made_for_a_conversion_goes_with_its_layers():
    class Local(nn.BatchNorm1d):
        pass

    layer = convert_sync_batchnorm(Local(3))
    watch, plain = weakref.ref(type(layer)), len(nn.BatchNorm2d.__subclasses__())
    convert_sync_batchnorm(nn.BatchNorm2d(3)), convert_sync_batchnorm(nn.BatchNorm2d(3))
    assert type(convert_sync_batchnorm(Local(3))) is watch()
    del layer, Local
    gc.collect()
    assert watch() is None
    assert len(nn.BatchNorm2d.__subclasses__()) <= plain + 1


@no_exchange
def test_one_rank_may_convert_a_layer_again():
    layer = SyncBatchNorm(3)
    key = layer._key
    assert convert_sync_batchnorm(layer)._key == key
    assert convert_sync_batchnorm(revert_sync_batchnorm(layer))._key != key


@no_exchange
def test_buffers_for_messages_of_any_length_do_not_pile_up():
    group = Communicator(MPI.COMM_SELF).ready()
    group.link = None  # native code has its own buffer
    for channels in range(1, 600):
        x = np.random.default_rng(channels).normal(size=(4, channels))
        y, _ = functional.batch_norm_forward(x, process_group=group)
        assert abs(y.mean()) < 1e-6
    assert len(group._messages) <= 256


def test_groups_of_one_rank_are_not_watched():
    group = resolve(WORLD.Split(RANK)).ready()
    assert group.rank_status not in rank_status.all_statuses()


def test_groups_are_watched_until_they_are_freed():
    group = Communicator().ready()
    watched = [group.rank_status in rank_status.all_statuses()]
    group.free()
    watched.append(group.rank_status in rank_status.all_statuses())
    assert watched == [SIZE > 1, False]


def test_groups_that_no_rank_uses_are_freed():
    x = shard((local_batch(), 3))
    SyncBatchNorm(3, process_group=Communicator())(x)
    before = len(unreferenced._tracked)
    for _ in range(20):
        SyncBatchNorm(3, process_group=Communicator())(x)
    assert len(unreferenced._tracked) == before


@several
def test_a_group_that_one_rank_still_uses_is_not_freed():
    x = shard((local_batch(), 3))
    group = Communicator()
    SyncBatchNorm(3, process_group=group)(x)
    kept = group.rank_status
    if RANK:
        del group
    for _ in range(3):
        Communicator().ready()
    alive = kept.comm is not None
    if not RANK:
        del group
    for _ in range(2):
        Communicator().ready()
    assert alive
    assert kept.comm is None


def test_a_duplicate_outlives_the_communicator_it_was_made_of():
    comm = WORLD.Dup()
    layer = SyncBatchNorm(3, process_group=comm)
    x = shard((local_batch(), 3))
    layer(x)
    comm.Free()
    Communicator().ready()
    layer(x)
    kept = layer.communicator.rank_status
    del layer
    Communicator().ready()
    assert kept.comm is None
