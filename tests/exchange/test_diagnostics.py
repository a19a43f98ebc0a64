"""Ranks that make different calls all raise an error, and nothing is changed."""

from __future__ import annotations

import copy
import pickle
import socket

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

import mpisyncbn
from mpisyncbn import CollectiveMismatchError, Communicator, SyncBatchNorm, functional, torch_versions
from support.oracle import distance, local_batch, oracle, shard
from support.ranks import WORLD, error_of, several

RANK, SIZE = WORLD.rank, WORLD.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_message_is_signed(dtype, recorded):
    layer = SyncBatchNorm(3, process_group=recorded.group, dtype=dtype)
    x = shard((local_batch(), 3, 2), dtype=dtype).requires_grad_()
    layer(x).pow(3).sum().backward()
    first_order = len(recorded.messages)
    (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    gradient.pow(2).sum().backward()
    signatures = [tuple(message[:2]) for _, message in recorded.messages]
    same = len(set(WORLD.allgather(tuple(signatures)))) == 1
    assert first_order == 2
    assert len(signatures) > 4
    assert same
    assert len(set(signatures)) == len(signatures)
    for h, square in signatures:
        assert h == int(h)
        assert 0 <= h < 2**18
        assert square == h * h


class Model:
    """Layers of 3 channels (``wide``: 4).

    ``a``, ``b`` and ``wide`` have names. Others are named after the exchange that first uses them.
    """

    def __init__(self, group):
        self.group = group
        layers = {name: nn.BatchNorm1d(4 if name == "wide" else 3) for name in ("a", "b", "wide")}
        self.layers = mpisyncbn.convert_sync_batchnorm(nn.ModuleDict(layers), group)
        self.layers["float64"] = SyncBatchNorm(3, process_group=group, dtype=torch.float64)
        self.layers.update({name: SyncBatchNorm(3, process_group=group) for name in ("first", "second")})
        self.x = shard((local_batch(), 3, 4))
        for name in ("first", "second"):
            self.forward(name)
        y = self.layers["a"](self.x.clone().requires_grad_())
        self.backward = y.sum().backward

    def forward(self, name):
        x = self.x.repeat(1, 2, 1)[:, : self.layers[name].num_features]
        return self.layers[name](x.double() if name == "float64" else x)

    def function(self):
        return mpisyncbn.sync_batch_norm(self.x, None, None, process_group=self.group)

    def call(self, what):
        {"backward": self.backward, "function": self.function}.get(what, lambda: self.forward(what))()

    def state(self):
        return {key: value.clone() for key, value in self.layers.state_dict().items()}


# The call of one rank, the call of all others, the words of the error for each, and the values of
# MPISYNCBN_DEBUG to try. Calls with other lengths of messages, or with another collective, need 1:
# the ranks then compare their calls before they send a message.
A, B = "forward of ModuleDict: a (3 channels, float32)", "forward of ModuleDict: b (3 channels, float32)"
CASES = {
    "skips a layer": ("b", "a", B, A, "01"),
    "skips a layer without a name": (
        *("second", "first", "forward of the layer first used in exchange number 2 (3 channels, float32)"),
        *("forward of the layer first used in exchange number 1 (3 channels, float32)", "01"),
    ),
    "calls the function": ("function", "a", "forward of a function call (3 channels, float32)", A, "01"),
    "is in backward": ("backward", "a", "backward of ModuleDict: a (3 channels, float32)", A, "01"),
    "has other channels": ("wide", "a", "forward of ModuleDict: wide (4 channels, float32)", A, "1"),
    "has another dtype": ("float64", "a", "(3 channels, float64)", A, "1"),
}


@several
@pytest.mark.parametrize("odd", [0, SIZE - 1])
@pytest.mark.parametrize(("case", "debug"), [(case, debug) for case in CASES for debug in CASES[case][-1]])
def test_a_mismatch_is_an_error_on_every_rank(case, debug, odd, monkeypatch):
    monkeypatch.setenv("MPISYNCBN_DEBUG", debug)
    mine, theirs, my_call, their_call, _ = CASES[case]
    model = Model(Communicator())
    before = model.state()
    error = error_of(lambda: model.call(mine if odd == RANK else theirs), CollectiveMismatchError)
    after = model.state()
    errors = WORLD.allgather(str(error))
    hosts = WORLD.allgather(socket.gethostname())
    for layer in model.layers.values():
        layer.momentum = 1.0
    right = model.forward("b"), model.forward("second")
    expected = oracle(model.x, model.x)

    assert error is not None
    assert all(torch.equal(before[key], after[key]) for key in before)
    for rank, (host, message) in enumerate(zip(hosts, errors, strict=True)):
        calls = [line for line in errors[RANK].splitlines() if line.startswith(f"  rank {rank} on {host}: ")]
        assert len(calls) == 1
        assert calls[0].endswith(my_call if rank == odd else their_call)
        assert f"expected all {SIZE} ranks of the group to make the same call" in message
        assert f"This is rank {rank}. Every rank must run the same layers" in message
    assert distance(right[0], expected.y) < 1e-5
    assert distance(right[1], expected.y) < 1e-5
    assert distance(model.layers["second"].running_mean, expected.mean) < 1e-5


@several
@pytest.mark.parametrize("debug", ["0", "1"])
def test_two_layers_swapped_on_one_rank(debug, monkeypatch):
    monkeypatch.setenv("MPISYNCBN_DEBUG", debug)
    model = Model(Communicator())
    before, names = model.state(), ("a", "b") if RANK else ("b", "a")
    errors = [error_of(lambda name=name: model.forward(name), CollectiveMismatchError) for name in names]
    after = model.state()
    assert all(errors)
    assert all(torch.equal(before[key], after[key]) for key in before)


@several
def test_layers_are_named_anew_after_a_mismatch(monkeypatch):
    """After a mismatch, ranks forget the names of layers: one may differ elsewhere."""
    monkeypatch.setenv("MPISYNCBN_DEBUG", "1")
    group = Communicator()
    layers = [SyncBatchNorm(channels, process_group=group) for channels in (3, 4)]
    inputs = [shard((2 + WORLD.rank, channels)) for channels in (3, 4)]
    odd = int(RANK == 0)
    error = error_of(lambda: layers[odd](inputs[odd]), CollectiveMismatchError)
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    group.free()
    assert "the layer first used in exchange number 1 (4 channels, float32)" in str(error)


class Generator(nn.Sequential):
    pass


def small(kind=nn.Sequential, **options):
    return kind(nn.BatchNorm1d(3, **options))


def converted(group, *pairs):
    return [mpisyncbn.convert_sync_batchnorm(net, group, name=name) for net, name in pairs]


# Two modules or functions, and the names of their calls. Rank 0 calls the first one first, all
# others the second.
SWAPPED = {
    "classes": (
        lambda group: converted(group, (small(Generator), None), (small(), None)),
        *("Generator: 0 (3 channels, float32)", "Sequential: 0 (3 channels, float32)"),
    ),
    "names": (
        lambda group: converted(group, (small(), "teacher"), (small(), "student")),
        *("teacher: 0 (3 channels, float32)", "student: 0 (3 channels, float32)"),
    ),
    "names of layers": (
        lambda group: converted(group, (nn.BatchNorm1d(3), "teacher"), (nn.BatchNorm1d(3), "student")),
        *("teacher (3 channels, float32)", "student (3 channels, float32)"),
    ),
    "eps, where the names are the same": (
        lambda group: converted(group, (small(), None), (small(eps=1e-3), None)),
        *("Sequential: 0 (3 channels, float32)", "Sequential: 0 (3 channels, float32, eps 0.001)"),
    ),
    "eps, without names": (
        lambda group: [SyncBatchNorm(3, eps, process_group=group) for eps in (0, 1e-3)],
        "the layer first used in exchange number 1 (3 channels, float32, eps 0.0)",
        "the layer first used in exchange number 1 (3 channels, float32, eps 0.001)",
    ),
    "eps of functions": (
        lambda group: [
            lambda x, e=e: mpisyncbn.sync_batch_norm(x, None, None, eps=e, process_group=group)
            for e in (0, 1)
        ],
        *("a function call (3 channels, float32, eps 0.0)", "a function call (3 channels, float32, eps 1.0)"),
    ),
    "eps of functions for arrays": (
        lambda group: [
            lambda x, e=e: functional.batch_norm_forward(x.numpy(), eps=e, process_group=group)
            for e in (0, 1)
        ],
        "functional.batch_norm (3 channels, float32, eps 0.0)",
        "functional.batch_norm (3 channels, float32, eps 1.0)",
    ),
}


@several
@pytest.mark.parametrize("what", SWAPPED)
def test_models_in_another_order_on_one_rank(what):
    make, *names = SWAPPED[what]
    calls, x = make(Communicator()), shard((local_batch(), 3))
    messages = []
    for call in calls if RANK == 0 else calls[::-1]:
        with pytest.raises(CollectiveMismatchError) as caught:
            call(x)
        messages.append(str(caught.value))
    for message, (first, others) in zip(messages, (names, names[::-1]), strict=True):
        lines = message.replace("exchange number 2", "exchange number 1").splitlines()[1:-1]
        assert lines[0].endswith(f": forward of {first}")
        assert all(line.endswith(f": forward of {others}") for line in lines[1:])
    for net in calls:
        assert not isinstance(net, nn.Module) or not next(net.buffers()).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns about itself
@pytest.mark.parametrize("debug", ["0", "1"])
def test_eps_of_another_type_is_the_same(debug, monkeypatch):
    """Ranks may pass 0, 0.0 or np.float64(0) as eps, and one rank alone may compile its layer."""
    monkeypatch.setenv("MPISYNCBN_DEBUG", debug)
    layer = SyncBatchNorm(
        3, 0 if RANK == SIZE - 1 else [0.0, np.float64(0)][RANK % 2], process_group=Communicator()
    )
    x = shard((local_batch(), 3))
    leaf = x.clone().requires_grad_()
    compiled = RANK == SIZE - 1 and torch_versions.COMPILES
    call = torch.compile(layer, backend="eager") if compiled else layer
    y = call(leaf)
    y.pow(3).sum().backward()
    expected = oracle(x, 3 * y.detach() ** 2, eps=0)
    assert distance(y, expected.y) < 1e-5
    assert distance(leaf.grad, expected.dx, torch.ones(1)) < 1e-4  # the gradient of only two values is 0


@pytest.mark.parametrize("debug", ["0", "1"])
def test_ranks_may_build_different_layers(debug, monkeypatch):
    monkeypatch.setenv("MPISYNCBN_DEBUG", debug)
    group = Communicator()
    layers = {}
    for name in ("a", "b", "c") if RANK else ("c", "b", "a"):
        layers[name] = SyncBatchNorm(3, momentum=1.0, process_group=group)
        if RANK == 0:
            SyncBatchNorm(3, process_group=group)
    x = shard((local_batch(), 3, 4))
    leaf = x.clone().requires_grad_()
    y = layers["a"](leaf)
    if RANK == 0:
        ema = copy.deepcopy(layers["a"]).eval()
        ema(x)
        alone = mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), MPI.COMM_SELF)
        alone(leaf).sum().backward()
        mpisyncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), group, name="of rank 0 alone")
    y.sum().backward()
    for name in ("b", "c", "a"):
        layers[name](x)
    expected = oracle(x, x)
    for layer in layers.values():
        assert distance(layer.running_mean, expected.mean) < 1e-5


@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize("own", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_one_rank_may_go_on_with_a_copy(own, debug, monkeypatch):
    monkeypatch.setenv("MPISYNCBN_DEBUG", debug)
    net = mpisyncbn.convert_sync_batchnorm(small(momentum=1.0))
    x = shard((local_batch(), 3))
    net(x)
    if RANK == 0:
        net = own(net)
    net(x + 1)
    assert distance(net[0].running_mean, oracle(x + 1, x).mean) < 1e-5


@pytest.mark.parametrize("debug", ["0", "1"])
def test_ranks_may_differ_in_the_dtype_of_their_input(debug, monkeypatch):
    monkeypatch.setenv("MPISYNCBN_DEBUG", debug)
    layer = SyncBatchNorm(3, process_group=Communicator())
    bfloat16 = RANK == 0
    x = (torch.ones(4, 3).bfloat16() if bfloat16 else torch.ones(0, 3)).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == (torch.bfloat16 if bfloat16 else torch.float32)


@several
def test_debug_mode_on_one_rank_is_on_everywhere(monkeypatch):
    """Open MPI hands the environment to the ranks of the first host only."""
    monkeypatch.setenv("MPISYNCBN_DEBUG", "1" if RANK == 0 else "0")
    group = Communicator()
    y = SyncBatchNorm(3, process_group=group)(shard((local_batch(), 3)))
    assert group.debug
    assert y.shape == (local_batch(), 3)
