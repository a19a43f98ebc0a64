"""Conversion changes a layer's class and nothing else, and reverting leaves no trace of it."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from mpisyncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from mpisyncbn.convert import BatchNorm
from support.models import (
    C,
    Named,
    NamedSync,
    Twice,
    contents,
    data,
    equal,
    kinds,
    layers,
    network,
    randomize,
    step,
    through_pickle,
)
from support.oracle import HAS_BIAS, distance, oracle
from support.ranks import WORLD, no_exchange, together

NDIM = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5, nn.SyncBatchNorm: 4, BatchNorm: 4}
LAZY = {nn.LazyBatchNorm1d: 3, nn.LazyBatchNorm2d: 4, nn.LazyBatchNorm3d: 5}
OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"bias": False}, {"track_running_stats": False}]
if not HAS_BIAS:
    OPTIONS.remove({"bias": False})
OPTIONS += [{"dtype": torch.float64}, {"dtype": torch.bfloat16}]


class LazyNamed(nn.LazyBatchNorm2d):
    cls_to_become = Named


class MySync(SyncBatchNorm):
    pass


class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.BatchNorm2d(C))
        self.scale = nn.Parameter(torch.ones(2))


def places(module):
    return [(name, id(m)) for name, m in module.named_modules(remove_duplicate=False)]


# --- Things that stay the same


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", NDIM)
def test_only_the_class_changes(kind, options):
    x = data(NDIM[kind], options.get("dtype", torch.float32))
    layer = randomize(kind(C, eps=1e-3, **options)).eval()
    plain, before = deepcopy(layer), contents(layer)
    assert convert_sync_batchnorm(layer) is layer
    if kind in (nn.SyncBatchNorm, BatchNorm):
        assert type(layer) is SyncBatchNorm
    else:
        assert type(layer).__bases__ == (SyncBatchNorm, kind)
    assert contents(layer)[1] == before[1]
    assert vars(layer).keys() - before[0][0].keys() <= {
        "layer_name",
        "_key",
        "_converted_from",
    }
    assert torch.equal(layer(x), plain(x))
    assert revert_sync_batchnorm(layer) is layer
    assert type(layer) is kind
    assert contents(layer) == before
    assert equal(step(layer.train(), x), step(plain.train(), x))


def test_attributes_groups_devices_and_shared_parameters():
    net = nn.Sequential(
        nn.BatchNorm2d(C, device="meta"), Named(), nn.SyncBatchNorm(C, process_group="torch's")
    )
    net[0].requires_grad_(False)
    net[0].weight, net[0].qconfig, net[0].layer_name = net[1].weight, object(), "the user's own"
    before = contents(net)
    convert_sync_batchnorm(net)
    assert net[0].weight is net[1].weight
    assert net[0].running_mean.is_meta
    assert not net[0].bias.requires_grad
    assert net[2].process_group is None
    assert contents(revert_sync_batchnorm(net)) == before


def test_other_layers_are_left_alone():
    norms = nn.InstanceNorm2d(C, affine=True), nn.LazyInstanceNorm2d(), nn.GroupNorm(1, C), nn.LayerNorm(C)
    net = nn.Sequential(*norms, nn.Conv2d(C, C, 1), nn.Identity())
    before = places(net), kinds(net), contents(net)
    for change in (convert_sync_batchnorm, revert_sync_batchnorm):
        assert change(net) is net
        assert (places(net), kinds(net), contents(net)) == before


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_hooks_fire_converted_and_reverted():
    def note(what, *_, **__):
        fired.append(what)

    layer, other = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
    kinds = "forward_pre", "forward", "full_backward_pre", "full_backward"
    kinds += "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"
    for kind in kinds:
        getattr(layer, f"register_{kind}_hook")(partial(note, kind))
    layer.weight.register_hook(partial(note, "weight"))
    other.register_backward_hook(partial(note, "backward"))
    net = nn.Sequential(layer, other)
    rounds = []
    for change in (nn.Identity(), convert_sync_batchnorm, revert_sync_batchnorm, convert_sync_batchnorm):
        fired = []
        change(net)(data()).pow(3).sum().backward()
        net.load_state_dict(net.state_dict())
        rounds.append(sorted(fired))
    assert rounds == [sorted([*kinds, "weight", "backward"])] * 4


def test_aliases_stay_one_and_layers_take_their_first_name():
    class Parent(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.inner, self.again = nn.ModuleDict({"a": shared}), shared

    shared, wrapper = nn.BatchNorm2d(C), nn.Module()
    wrapper.module = nn.Sequential(Parent(shared), Parent(shared), nn.BatchNorm2d(C))
    before = places(wrapper)
    convert_sync_batchnorm(wrapper)
    assert places(wrapper) == before
    assert [m.layer_name for m in layers(wrapper)] == [
        f"Module(Sequential): module.{place}" for place in ("0.inner.a", "2")
    ]
    convert_sync_batchnorm(wrapper.module)
    assert [m.layer_name for m in layers(wrapper)] == ["Sequential: 0.inner.a", "Sequential: 2"]
    assert convert_sync_batchnorm(shared).layer_name is None
    assert layers(revert_sync_batchnorm(wrapper)) == []
    assert places(wrapper) == before


def test_the_name_of_a_model():
    def name(model, **given):
        return layers(convert_sync_batchnorm(model, **given))[0].layer_name

    assert name(Generator()) == "Generator: 0"
    assert name(parametrize.register_parametrization(Generator(), "scale", Twice())) == "Generator: 0"
    assert name(nn.DataParallel(Generator())) == "DataParallel(Generator): module.0"
    assert name(torch.compile(Generator())) == "OptimizedModule(Generator): _orig_mod.0"
    assert name(torch.optim.swa_utils.AveragedModel(Generator())) == "AveragedModel(Generator): module.0"
    net = nn.ModuleDict({"module": Generator(), "other": Generator()})
    assert name(net) == "ModuleDict: module.0"
    assert name(net, name="a teacher") == "a teacher: module.0"
    assert name(deepcopy(net)["module"]) == "Generator: 0"  # the last conversion named it
    assert [layers(copy(net))[1].layer_name for copy in (deepcopy, through_pickle)] == [
        "a teacher: other.0"
    ] * 2
    assert name(revert_sync_batchnorm(net)) == "ModuleDict: module.0"
    assert (
        name(SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(net), name="G")) == "Sequential: 0.module.0"
    )
    assert SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(C), name="alone").layer_name == "alone"


def test_state_dicts_load_strictly_both_ways():
    plain, converted, again = randomize(network()), convert_sync_batchnorm(network()), network()
    converted.load_state_dict(plain.state_dict())
    again.load_state_dict(converted.state_dict())
    assert list(converted.state_dict()) == list(plain.state_dict())
    assert converted.state_dict()._metadata == plain.state_dict()._metadata
    assert equal(again.state_dict().values(), plain.state_dict().values())


# --- Parametrized, pruned, fused, lazy


@no_exchange
def test_parametrizations_in_any_order():
    def operate(operation, name):
        if operation == "register":
            parametrize.register_parametrization(layer, name, Twice())
        elif operation == "remove":
            parametrize.remove_parametrizations(layer, name)
        else:
            {"convert": convert_sync_batchnorm, "revert": revert_sync_batchnorm}[operation](layer)

    x, makers = data(), itertools.cycle([partial(nn.BatchNorm2d, C), Named, partial(nn.SyncBatchNorm, C)])
    starts = [("convert", ""), ("register", "weight"), ("register", "bias")]
    ends = [("revert", ""), ("remove", "weight"), ("remove", "bias")]
    for order in itertools.permutations(starts + ends):
        if any(order.index(start) > order.index(end) for start, end in zip(starts, ends, strict=True)):
            continue
        layer = randomize(next(makers)()).eval()
        kind, expected, active = type(layer), layer(x), set()
        for operation, name in order:
            operate(operation, name)
            active ^= {name}
            assert isinstance(layer, SyncBatchNorm) == ("" in active), order
            assert isinstance(layer, kind) or "" in active, order
            assert parametrize.is_parametrized(layer, "bias") == ("bias" in active), order
            assert torch.equal(layer(x), expected), order
        assert type(layer) is kind, order


@no_exchange
def test_parametrized_copies_are_converted_apart_and_not_kept_alive():
    layer = parametrize.register_parametrization(nn.BatchNorm2d(C), "weight", Twice())
    copy = convert_sync_batchnorm(deepcopy(layer))
    assert isinstance(deepcopy(copy), SyncBatchNorm)
    assert not isinstance(layer, SyncBatchNorm)
    parametrize.remove_parametrizations(copy, "weight")
    assert parametrize.is_parametrized(layer, "weight")
    watch = weakref.ref(convert_sync_batchnorm(layer))
    del layer
    gc.collect()
    assert watch() is None


def test_weight_norm_trains():
    weight_norm = partial(parametrizations.weight_norm, dim=None)
    first = weight_norm(convert_sync_batchnorm(nn.BatchNorm2d(C)))
    second = convert_sync_batchnorm(weight_norm(nn.BatchNorm2d(C)))
    for layer in (first, second):
        layer(data()).pow(3).sum().backward()
    assert {type(layer).__name__ for layer in (first, second)} == {"ParametrizedSyncBatchNorm"}
    assert all(p.grad.any() for layer in (first, second) for p in layer.parameters())


def test_pruning_survives():
    layer = prune.l1_unstructured(randomize(nn.BatchNorm2d(C)), "weight", amount=1)
    y = convert_sync_batchnorm(layer)(data())
    prune.remove(revert_sync_batchnorm(layer), "weight")
    pruned = layer.weight == 0
    assert pruned.sum() == 1
    assert torch.equal((y == layer.bias.view(-1, 1, 1)).all(dim=(0, 2, 3)), pruned)


def test_fusing_with_a_convolution():
    conv, bn, x = nn.Conv2d(C, C, 1).eval(), randomize(nn.BatchNorm2d(C)).eval(), data()
    expected = fusion.fuse_conv_bn_eval(conv, bn)(x)
    for change in (convert_sync_batchnorm, revert_sync_batchnorm):
        assert torch.equal(fusion.fuse_conv_bn_eval(conv, change(bn))(x), expected)


@pytest.mark.parametrize("kind", [*LAZY, LazyNamed])
@pytest.mark.parametrize("load", [False, True])
def test_lazy(kind, load):
    layer, early, x = convert_sync_batchnorm(kind()), kind(), data(LAZY.get(kind, 4))
    assert isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, kind)
    if load:
        layer.load_state_dict(randomize(nn.BatchNorm1d(C)).state_dict())
    layer = pickle.loads(pickle.dumps(layer))
    expected = oracle(x, x, *(layer.parameters() if load else ()))
    y = layer(x)
    revert_sync_batchnorm(convert_sync_batchnorm(early))(x)
    assert isinstance(layer, SyncBatchNorm)
    assert not isinstance(layer, kind)
    assert distance(y, expected.y) < 1e-5
    assert layer.num_batches_tracked == 1
    assert type(layer) is type(convert_sync_batchnorm(early))
    assert type(revert_sync_batchnorm(layer)) is type(revert_sync_batchnorm(early)) is kind.cls_to_become


# --- Subclasses


@pytest.mark.parametrize("make", [Named, partial(NamedSync, C)])
def test_a_subclass_keeps_all_but_its_forward(make):
    layer, x = make(), data()
    kind, text = type(layer), repr(layer)
    expected = oracle(x, x)
    y = convert_sync_batchnorm(layer)(x)
    assert isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, kind)
    assert distance(y, expected.y) < 1e-5
    assert type(layer) is type(convert_sync_batchnorm(make()))
    assert repr(layer) == f"SyncBatchNorm{text}"
    assert kind is NamedSync or (layer.shout(), layer._version) == ("A TITLE", 7)
    assert type(revert_sync_batchnorm(layer)) is kind


def test_the_method_of_a_subclass_makes_that_subclass():
    net = MySync.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C), Named(), nn.LazyBatchNorm2d()))
    net(data())
    plain = [nn.Sequential, nn.BatchNorm2d, Named, nn.BatchNorm2d]
    assert type(net[0]) is type(net[2])
    assert type(net[0]).__bases__ == (MySync, nn.BatchNorm2d)
    assert repr(net[0]) == repr(MySync(C))
    assert isinstance(net[1], MySync)
    assert isinstance(net[1], Named)
    assert kinds(convert_sync_batchnorm(deepcopy(net))) == kinds(net)  # they are SyncBatchNorm already
    assert kinds(revert_sync_batchnorm(net)) == plain
    MySync.convert_sync_batchnorm(convert_sync_batchnorm(net))
    assert all(isinstance(layer, MySync) for layer in net)
    assert kinds(revert_sync_batchnorm(net)) == plain


def test_built_synchronized_and_reverted():
    layer = revert_sync_batchnorm(SyncBatchNorm(C, process_group=WORLD))
    assert type(layer) is BatchNorm
    assert "process_group" not in vars(layer)
    assert [layer(data(ndim)).ndim for ndim in (2, 3, 4, 5)] == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"expected at least 2D input, \(N, C, \*\), got 1D input \(on rank"):
        layer(torch.ones(C))


# --- Any model

POOL = [partial(kind, C, **options) for kind, options in zip(NDIM, OPTIONS, strict=False)]
POOL += [*LAZY, Named, LazyNamed, partial(NamedSync, C), partial(nn.InstanceNorm2d, C), nn.Identity]
POOL += [lambda: parametrize.register_parametrization(Named(), "weight", Twice())]
TREES = st.recursive(st.integers(0, len(POOL) - 1), partial(st.lists, max_size=4), max_leaves=12)


@given(TREES, st.booleans(), st.sampled_from([SyncBatchNorm, MySync]))
def test_any_model_there_and_back(tree, twice, to):
    def build(tree):  # equal numbers stand for one layer
        return pool[tree] if isinstance(tree, int) else nn.Sequential(*map(build, tree))

    pool = [make() for make in POOL]
    net = build(tree)
    before = places(net), kinds(net), contents(net)
    with together():
        for _ in range(1 + twice):
            to.convert_sync_batchnorm(net)
        assert places(net) == before[0]
        assert contents(net)[1] == before[2][1]
        for kind, module in zip(before[1], net.modules(), strict=True):
            batch_norm = issubclass(kind, nn.modules.batchnorm._BatchNorm)
            assert isinstance(module, to) if batch_norm else type(module) is kind
        revert_sync_batchnorm(net)
        assert (places(net), kinds(net), contents(net)) == before
