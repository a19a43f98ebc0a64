"""Layers that conversion refuses by name, and those that it warns of."""

from __future__ import annotations

import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mpisyncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from support.models import C, Named, Twice, contents, kinds, layers, network
from support.ranks import WORLD


class OwnForward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class LazyOwnForward(nn.LazyBatchNorm2d):
    cls_to_become = OwnForward


@pytest.mark.parametrize("make", [partial(OwnForward, C), LazyOwnForward, partial(nn.BatchNorm2d, C)])
def test_a_forward_of_its_own_is_refused_by_name(make):
    layer = make()
    if type(layer) is nn.BatchNorm2d:
        layer.forward = torch.relu
    net = nn.ModuleDict({"good": nn.BatchNorm2d(C), "bad": nn.Sequential(Named(), layer)})
    before = kinds(net), contents(net)
    name = f"({type(layer).__module__}.{type(layer).__name__}) (on rank {WORLD.rank} of {WORLD.size})"
    lost = "cannot convert layers whose own forward() would be lost:"
    with pytest.raises(TypeError, match=re.escape(f"{lost} bad.1 {name}") + ".*no layer was changed"):
        convert_sync_batchnorm(net)
    assert (kinds(net), contents(net)) == before
    with pytest.raises(TypeError, match=re.escape(f"{lost} the module itself {name}")):
        convert_sync_batchnorm(layer)


class Scaled(SyncBatchNorm):
    def forward(self, input):
        return 0.5 * super().forward(input)


@pytest.mark.parametrize("make", [Scaled, SyncBatchNorm, nn.BatchNorm2d])
def test_reverting_refuses_a_forward_of_its_own_by_name(make):
    net = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C), make(C)))
    layer = net[1]
    if make is not Scaled:
        layer.forward = torch.relu
    before = kinds(net), contents(net)
    lost = f"cannot revert layers whose own forward() would be lost: 1 ({type(layer).__module__}."
    with pytest.raises(TypeError, match=re.escape(lost) + ".*on rank.*no layer was changed"):
        revert_sync_batchnorm(net)
    assert (kinds(net), contents(net)) == before


def test_reverting_restores_the_forward_that_a_converted_layer_had():
    net = nn.Sequential(nn.BatchNorm2d(C), nn.SyncBatchNorm(C))
    before = kinds(net)
    Scaled.convert_sync_batchnorm(net)
    net[0].forward = net[0].forward  # as a tool that has wrapped it sets it back
    assert kinds(revert_sync_batchnorm(net)) == before
    net.eval()[0](torch.ones(2, C, 1, 1))


def test_many_layers_are_refused_in_one_line():
    """For each class, the error names one layer and counts the others: models of timm have many."""

    class Other(OwnForward):
        pass

    net = nn.Sequential(*(OwnForward(C) for _ in range(40)), nn.Sequential(Other(C), nn.BatchNorm2d(C)))
    found = f"0, and 39 more ({__name__}.OwnForward), 40.0 ({__name__}.{Other.__qualname__}) (on rank"
    with pytest.raises(TypeError, match=re.escape(f"would be lost: {found}")):
        convert_sync_batchnorm(net)
    synchronized = nn.Sequential(*(SyncBatchNorm(C, activation="relu") for _ in range(3)))
    with pytest.raises(TypeError, match=re.escape("activation would be lost: 0 (relu), and 2 more (on rank")):
        revert_sync_batchnorm(synchronized)
    taken = nn.Sequential(*(nn.BatchNorm2d(C) for _ in range(3)))
    for layer in taken:
        layer.activation = nn.ReLU()
    with pytest.raises(TypeError, match=re.escape("members would be hidden: 0, and 2 more (activation)")):
        convert_sync_batchnorm(taken)


class ByMethod(nn.BatchNorm2d):
    def activation(self, x):
        return x.relu()


class ByClass(nn.SyncBatchNorm):
    layer_name = communicator = "the user's own"


class LazyByMethod(nn.LazyBatchNorm2d):
    cls_to_become = ByMethod


def having(name, value, kind=nn.BatchNorm2d):
    layer = kind(C)
    setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (partial(having, "activation", "leaky_relu"), ["activation"]),
        (partial(having, "memory_efficient", nn.Parameter(torch.ones(1))), ["memory_efficient"]),
        (partial(having, "process_group", None), ["process_group"]),
        (partial(having, "_key", 3, nn.SyncBatchNorm), ["_key"]),
        (partial(ByMethod, C), ["activation"]),
        (partial(ByClass, C), ["communicator", "layer_name"]),
        (LazyByMethod, ["activation"]),
    ],
)
def test_members_that_conversion_would_hide_are_refused_by_name(make, names):
    """Those that reverting restores are in test_convert.py."""
    net = nn.Sequential(nn.BatchNorm2d(C), nn.SyncBatchNorm(C), make())
    before = kinds(net), contents(net)
    found = re.escape(", ".join(f"2 ({name})" for name in names))
    with pytest.raises(TypeError, match=f"members would be hidden: {found} .on rank.*no layer was changed"):
        convert_sync_batchnorm(net)
    assert (kinds(net), contents(net)) == before


class Tagged(nn.BatchNorm2d):
    def __init_subclass__(cls, tag):
        cls.tag = tag


class Derived(Tagged, tag=3):
    pass


def test_a_class_that_takes_no_subclass_is_refused_by_name():
    net = nn.Sequential(nn.BatchNorm2d(C), Scaled.convert_sync_batchnorm(nn.BatchNorm2d(C)), Derived(C))
    before = kinds(net), contents(net)
    words = (
        f"cannot convert 2: no class can be derived from SyncBatchNorm and {__name__}.Derived: .*'tag' .on "
    )
    with pytest.raises(TypeError, match=words + "rank .* take any subclass.*no layer was changed"):
        convert_sync_batchnorm(net)
    assert (kinds(net), contents(net)) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_jit_is_refused():
    compiled = torch.jit.script(nn.Sequential(nn.BatchNorm2d(C)).eval())
    net = nn.Sequential(nn.BatchNorm2d(C), compiled)
    message = re.escape(f"it is compiled by torch.jit (on rank {WORLD.rank} of {WORLD.size})")
    with pytest.raises(TypeError, match=f"cannot convert 1.0: {message}.*no layer was changed"):
        convert_sync_batchnorm(net)
    assert type(net[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match=f"cannot convert the module itself: {message}"):
        convert_sync_batchnorm(getattr(compiled, "0"))


@pytest.mark.parametrize(("name", "kind"), [(3, TypeError), ("", ValueError), ("#1", ValueError)])
def test_a_wrong_name_changes_nothing(name, kind):
    net = network()
    with pytest.raises(
        kind, match=r"expected (name to be a str or None|a name, not empty .*), got .*on rank"
    ):
        convert_sync_batchnorm(net, name=name)
    assert layers(net) == []
    layer = SyncBatchNorm(C)
    with pytest.raises(kind, match=r"expected (a )?layer_name.*, got .*on rank.*: .* rename yours"):
        layer.layer_name = name
    assert layer.layer_name is None


def test_a_wrong_group_changes_nothing():
    layer = nn.BatchNorm2d(C)
    with pytest.raises(TypeError, match="process_group to be"):
        convert_sync_batchnorm(layer, "world")
    assert type(layer) is nn.BatchNorm2d


class BatchNorms:
    """Batch norms like those of other libraries, which are not derived from torch's."""

    class BatchNorm(nn.Module):  # e3nn's
        def __init__(self, mean=True):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(C) if mean else None)
            self.scale = nn.Parameter(torch.ones(C))

    class Derived(BatchNorm):
        pass

    class ComplexBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.running_mean = nn.Parameter(torch.zeros(C), requires_grad=False)

    class FrozenBatchNorm2d(BatchNorm):  # torchvision's, detectron2's
        pass

    class HoldsBatchNorm(nn.Module):  # PyTorch Geometric's
        def __init__(self):
            super().__init__()
            self.module = nn.BatchNorm1d(C)

        @property
        def running_mean(self):
            return self.module.running_mean


def test_batch_norms_that_are_not_torchs_are_named_once():
    silent = BatchNorms.FrozenBatchNorm2d(), BatchNorms.HoldsBatchNorm(), BatchNorms.BatchNorm(mean=False)
    tracked = nn.InstanceNorm2d(C, track_running_stats=True), nn.LazyBatchNorm2d(), SyncBatchNorm(C), Named()
    parametrized = parametrize.register_parametrization(BatchNorms.BatchNorm(), "scale", Twice())
    others = BatchNorms.BatchNorm(), BatchNorms.Derived(), BatchNorms.ComplexBatchNorm2d(), parametrized
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_sync_batchnorm(nn.Sequential(*silent, *tracked))
    net = nn.Sequential(nn.BatchNorm2d(C), nn.Sequential(*others))
    with pytest.warns(UserWarning, match="no BatchNorm of torch's") as caught:
        convert_sync_batchnorm(net)
    kinds = "BatchNorm", "Derived", "ComplexBatchNorm2d", "BatchNorm"
    names = ", ".join(f"1.{i} ({__name__}.BatchNorms.{kind})" for i, kind in enumerate(kinds))
    assert len(caught) == 1
    assert f"stay local to each rank: {names} (on rank {WORLD.rank} of" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(layers(net)) == 1


class Strict(nn.BatchNorm2d):
    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.weight)

    def _check_input_dim(self, input):
        if input.shape[-1] != 4:
            raise ValueError("expected 4 columns")


def test_a_check_and_an_initialization_of_the_users_own_are_kept():
    with torch.device("meta"):
        layer = convert_sync_batchnorm(Strict(3))
    with pytest.raises(ValueError, match=r"got meta.*to_empty.*reset_parameters"):
        layer(torch.ones(2, 3, 4, 4))
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.tolist() == [0, 0, 0]
    assert layer.running_var.tolist() == [1, 1, 1]
    for training in (True, False):
        layer.train(training)(torch.randn(2, 3, 4, 4))
        with pytest.raises(ValueError, match="expected 4 columns"):
            layer(torch.randn(2, 3, 4, 5))
