"""Conversion of layers whose own forward is registered with ``register_conversion``."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mpisyncbn
from mpisyncbn import SyncBatchNorm, convert_sync_batchnorm, register_conversion, revert_sync_batchnorm
from mpisyncbn.convert.registry import _forwards, drop_and_act, registered_forward
from support.activations import ACTIVATIONS, TORCHS
from support.models import C
from support.ranks import WORLD, no_exchange, together
from support.whole_batch import distance


class NormAct(nn.BatchNorm2d):
    """A layer like timm's BatchNormAct2d: batch norm, dropout, activation."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Inherits(NormAct):
    pass


class Overrides(NormAct):
    def forward(self, x):
        return -super().forward(x)


class SyncNormAct(nn.SyncBatchNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


class LazyNormAct(nn.LazyBatchNorm2d):
    cls_to_become = NormAct

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.act = nn.Identity(), nn.ReLU()


@pytest.fixture(autouse=True)
def registered():
    before = dict(_forwards)
    register_conversion(NormAct, drop_and_act)
    register_conversion(f"{__name__}.SyncNormAct")(drop_and_act)
    yield
    _forwards.clear()
    _forwards.update(before)


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        *((NormAct, copy.deepcopy(TORCHS[each])) for each in [None, *ACTIVATIONS]),
        *((Inherits, act) for act in (nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Sigmoid())),
    ],
    ids=str,
)
def test_a_registered_layer_trains_as_the_whole_batch(kind, act):
    torch.manual_seed(0)
    local = kind(C, act).double()
    layer = convert_sync_batchnorm(copy.deepcopy(local))
    parts = [2 + rank for rank in range(WORLD.size)]
    whole = torch.randn(sum(parts), C, 3, 2, dtype=torch.float64)
    start = sum(parts[: WORLD.rank])
    mine = slice(start, start + parts[WORLD.rank])
    x, expected_x = whole[mine].clone().requires_grad_(), whole.clone().requires_grad_()
    y, expected = layer(x), local(expected_x)
    dy = torch.randn_like(whole)
    y.backward(dy[mine])
    expected.backward(dy)
    dweight = WORLD.allreduce(layer.weight.grad.numpy())
    with together():
        assert isinstance(layer, kind)
        assert isinstance(layer, SyncBatchNorm)
        assert distance(y, expected[mine]) < 1e-12
        assert distance(x.grad, expected_x.grad[mine], expected_x.grad) < 1e-12
        assert distance(torch.from_numpy(dweight), local.weight.grad) < 1e-12
        assert distance(layer.running_var, local.running_var) < 1e-12
        layer.eval(), local.eval()
        assert distance(layer(x), local(x)) < 1e-12


def test_a_relu_is_fused_unless_hooks_see_it_or_dropout_comes_before(monkeypatch):
    layer, x = convert_sync_batchnorm(NormAct(C)), torch.randn(3, C, 2, 2)
    calls = []
    relu = torch.nn.functional.relu
    monkeypatch.setattr(torch.nn.functional, "relu", lambda *args, **kw: calls.append(1) or relu(*args, **kw))
    y, counts = [layer(x)], [len(calls)]
    removable = layer.act.register_forward_hook(lambda *_: None)
    y, counts = [*y, layer(x)], [*counts, len(calls)]
    removable.remove()
    removable = nn.modules.module.register_module_forward_hook(lambda *_: None)
    y, counts = [*y, layer(x)], [*counts, len(calls)]
    removable.remove()
    layer.drop = nn.Dropout(0.0)
    y, counts = [*y, layer(x)], [*counts, len(calls)]
    layer.drop, layer.act.forward = nn.Identity(), lambda y: y * 0 + 7
    replaced = layer(x)
    with together():
        assert counts == [0, 1, 2, 3]
        assert all(torch.equal(y[0], other) for other in y)
        assert y[0].min() == 0
        assert (replaced == 7).all()
    # The ReLU is not fused: the layer's own dropout and activation come before it.
    net = convert_sync_batchnorm(nn.Sequential(NormAct(C, nn.SiLU()), nn.ReLU()), fuse_relu=True)
    assert type(net[1]) is nn.ReLU
    assert net[0].activation is None


def refuse_to_run(module, x):
    raise AssertionError(f"{module} ran: its layer should do its work")


def test_every_activation_is_fused(monkeypatch):
    layers = [convert_sync_batchnorm(NormAct(C, copy.deepcopy(TORCHS[each]))) for each in ACTIVATIONS]
    x = torch.randn(3, C, 2, 2)
    expected = [TORCHS[each](convert_sync_batchnorm(nn.BatchNorm2d(C))(x)) for each in ACTIVATIONS]
    for layer in layers:
        monkeypatch.setattr(type(layer.act), "forward", refuse_to_run)
    found = [layer(x) for layer in layers]
    with together():
        assert all(distance(ours, theirs) < 1e-6 for ours, theirs in zip(found, expected, strict=True))


@no_exchange
def test_revert_copies_and_pickles():
    net = nn.Sequential(NormAct(C), Inherits(C), SyncNormAct(C), LazyNormAct(), nn.BatchNorm2d(C))
    parametrize.register_parametrization(net[1], "weight", nn.Softplus())
    classes = [parametrize.type_before_parametrizations(each) for each in net.modules()]
    keys = list(net.state_dict())
    convert_sync_batchnorm(net)
    assert all(isinstance(each, SyncBatchNorm) for each in net)
    assert not isinstance(net[2], nn.SyncBatchNorm)  # DistributedDataParallel refuses those on CPUs
    assert list(net.state_dict()) == keys
    assert isinstance(net[0], NormAct)
    revert_sync_batchnorm(net)
    assert [parametrize.type_before_parametrizations(each) for each in net.modules()] == classes
    convert_sync_batchnorm(net[2:4])
    x = torch.randn(2, C, 2, 2)
    net[3](x)  # its first input initializes the lazy layer
    assert isinstance(net[3], NormAct)
    assert net[3](x).min() == 0
    for each in net[2:4]:
        for twin in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert type(twin) is type(each)
            assert torch.equal(twin(x), each(x))
    revert_sync_batchnorm(net)
    assert type(net[3]) is NormAct


@no_exchange
def test_refusals():
    lost = f"Overrides) (on rank {WORLD.rank} of {WORLD.size}). Say what it does with mpisyncbn.register"
    with pytest.raises(TypeError, match=re.escape(lost)):
        convert_sync_batchnorm(Overrides(C))
    saved = pickle.dumps(convert_sync_batchnorm(NormAct(C)))
    del _forwards[NormAct]
    with pytest.raises(TypeError, match=r"its own forward.. is not registered .*register_conversion before"):
        pickle.loads(saved)
    for wrong in (nn.ReLU, NormAct(C), 3):
        with pytest.raises(TypeError, match="expected a subclass of torch's batch norms or its full name"):
            register_conversion(wrong, drop_and_act)
    with pytest.raises(TypeError, match="expected forward to be callable, got int"):
        register_conversion(NormAct, 3)


def test_another_forward_may_be_registered():
    x = torch.randn(3, C, 2, 2)
    before = convert_sync_batchnorm(NormAct(C))(x)

    @mpisyncbn.register_conversion(NormAct)
    def forward(layer, batch_norm, x):
        return -batch_norm(x, activation="relu")

    after = convert_sync_batchnorm(NormAct(C))(x)
    with together():
        assert torch.equal(before, -after)


class Logged(SyncBatchNorm):
    calls = 0

    def forward(self, input, residual=None):
        Logged.calls += 1
        return super().forward(input, residual)


class SyncSlope(SyncNormAct):
    slope = 2.0

    def scaled(self, y):
        return y * self.slope


def test_members_and_a_forward_of_the_class_converted_to_are_kept():
    mpisyncbn.register_conversion(SyncSlope, lambda layer, batch_norm, x: layer.scaled(batch_norm(x)))
    x = torch.randn(3, C, 2, 2)
    scaled = convert_sync_batchnorm(SyncSlope(C))(x)
    plain = convert_sync_batchnorm(nn.BatchNorm2d(C))(x)
    Logged.calls = 0
    net = Logged.convert_sync_batchnorm(nn.Sequential(NormAct(C), nn.BatchNorm2d(C)))
    y = net(x)
    first = net[0](x)
    with together():
        assert torch.equal(scaled, 2 * plain)
        assert Logged.calls == 3
        assert torch.equal(first, plain.relu())
        assert y.shape == x.shape


@no_exchange
def test_the_last_registration_wins():
    name = f"{__name__}.NormAct"
    for key in (name, NormAct, name, Inherits, NormAct):
        forward = register_conversion(key, lambda layer, batch_norm, x: batch_norm(x))
        assert registered_forward(NormAct) is forward or key is Inherits
    assert registered_forward(Inherits) is not forward
