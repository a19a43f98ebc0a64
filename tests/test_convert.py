"""Conversion changes a layer's class and nothing else, and reverting leaves no trace of it."""

from __future__ import annotations

import gc
import io
import itertools
import pickle
import re
import weakref
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel import WORLD, distance, local_batch, oracle, shard, together
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import mpisyncbn
from mpisyncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from mpisyncbn.convert import BatchNorm

C = 3
NDIM = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5, nn.SyncBatchNorm: 4, BatchNorm: 4}
LAZY = {nn.LazyBatchNorm1d: 3, nn.LazyBatchNorm2d: 4, nn.LazyBatchNorm3d: 5}
OPTIONS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
]


class Named(nn.BatchNorm2d):
    """A subclass that adds to a BatchNorm but leaves its forward alone."""

    _version = 7

    def __init__(self, title="a title"):
        super().__init__(C)
        self.title = title

    def shout(self):
        return self.title.upper()

    def extra_repr(self):
        return f"{self.title}, {super().extra_repr()}"


class NamedSync(nn.SyncBatchNorm):
    pass


class LazyNamed(nn.LazyBatchNorm2d):
    cls_to_become = Named


class MySync(SyncBatchNorm):
    pass


class OwnForward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class Loud:
    def forward(self, input):
        return 2 * super().forward(input)


class OwnForwardByMixin(Loud, nn.BatchNorm2d):
    pass


class LazyOwnForward(nn.LazyBatchNorm2d):
    cls_to_become = OwnForward


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def network():
    blocks = [
        nn.Sequential(nn.Conv2d(C, C, 1, bias=False), bn, nn.ReLU()) for bn in (nn.BatchNorm2d(C), Named())
    ]
    return nn.Sequential(nn.BatchNorm2d(C), *blocks, nn.Flatten(2), nn.BatchNorm1d(C))


def data(ndim=4, dtype=torch.float32, seed=0):
    return shard((local_batch(2), C, *(4, 3, 2)[: ndim - 2]), seed, 0.5, dtype).requires_grad_()


def randomize(module):
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(5)) + 0.5)
    return module


def tree(module):
    return [(name, id(m), type(m)) for name, m in module.named_modules(remove_duplicate=False)]


def contents(module):
    """Every attribute of every module, and every tensor, by identity."""
    inside = [{k: id(v) for k, v in vars(m).items()} for m in module.modules()]
    return inside, [(k, id(v)) for k, v in module.state_dict(keep_vars=True).items()]


def step(module, x):
    """Everything a training step leaves behind."""
    y = module(x)
    gradients = torch.autograd.grad(y.pow(3).sum(), [x, *module.parameters()])
    return [y, *gradients, *(v.clone() for v in module.state_dict().values())]


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def is_sync(layer, cls=SyncBatchNorm):
    return isinstance(layer, cls)


# --- What stays


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", NDIM)
def test_only_the_class_changes(kind, options):
    layer = randomize(kind(C, eps=1e-3, **options)).train(kind is not nn.BatchNorm2d)
    x, plain, before = (
        data(NDIM[kind], options.get("dtype", torch.float32)),
        deepcopy(layer).eval(),
        contents(layer),
    )
    assert convert_sync_batchnorm(layer) is layer
    assert type(layer) is SyncBatchNorm
    assert contents(layer)[1] == before[1]
    assert vars(layer).keys() - before[0][0].keys() <= {"process_group", "layer_name", "_converted_from"}
    assert_same_bits([deepcopy(layer).eval()(x)], [plain(x)])
    assert revert_sync_batchnorm(layer) is layer
    assert type(layer) is kind
    assert contents(layer) == before
    assert_same_bits(step(layer.train(), x), step(plain.train(), x)) if layer.affine else None


def test_meta_device_frozen_parameters_and_attributes():
    net = nn.Sequential(nn.BatchNorm2d(C, device="meta"), Named())
    net[0].requires_grad_(False)
    net[0].weight, net[0].qconfig, net[0].layer_name = net[1].weight, object(), "the user's own"
    before = contents(net)
    convert_sync_batchnorm(net)
    assert net[0].weight is net[1].weight
    assert not net[0].bias.requires_grad
    assert net[0].running_mean.is_meta
    assert contents(revert_sync_batchnorm(net)) == before


def test_torch_process_group_comes_back():
    layer = nn.SyncBatchNorm(C, process_group=(group := object()))
    assert convert_sync_batchnorm(layer).process_group is None
    assert revert_sync_batchnorm(layer).process_group is group


def test_other_layers_are_left_alone():
    others = [
        nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
        nn.GroupNorm(1, C),
        nn.LayerNorm(C),
    ]
    net = nn.Sequential(*others, nn.LazyInstanceNorm2d(), nn.Conv2d(C, C, 1), nn.Identity())
    before = tree(net), contents(net)
    assert (tree(convert_sync_batchnorm(net)), contents(net)) == before
    assert (tree(revert_sync_batchnorm(net)), contents(net)) == before


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_hooks_fire_converted_and_reverted():
    fired = []

    def note(what, *_, **__):
        fired.append(what)

    layer, other = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
    layer.register_forward_pre_hook(partial(note, "forward pre"))
    layer.register_forward_hook(partial(note, "forward"))
    layer.register_full_backward_pre_hook(partial(note, "backward pre"))
    layer.register_full_backward_hook(partial(note, "backward"))
    layer.register_state_dict_pre_hook(partial(note, "save pre"))
    layer.register_state_dict_post_hook(partial(note, "save"))
    layer.register_load_state_dict_pre_hook(partial(note, "load pre"))
    layer.register_load_state_dict_post_hook(partial(note, "load"))
    layer.weight.register_hook(partial(note, "weight"))
    other.register_backward_hook(partial(note, "old backward"))
    net = nn.Sequential(layer, other)
    rounds = []
    for change in (nn.Identity(), convert_sync_batchnorm, revert_sync_batchnorm, convert_sync_batchnorm):
        change(net)(data()).square().sum().backward()
        net.load_state_dict(net.state_dict())
        rounds.append(sorted(fired))
        fired.clear()
    assert len(rounds[0]) == 10
    assert rounds == [rounds[0]] * 4


def test_aliases_stay_one_and_take_their_first_name():
    class Parent(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.inner, self.again = nn.ModuleDict({"a": shared}), shared

    shared = nn.BatchNorm2d(C)
    net = nn.Sequential(Parent(shared), Parent(shared), nn.BatchNorm2d(C))
    before = tree(net)
    convert_sync_batchnorm(net)
    assert net[0].again is net[0].inner["a"] is net[1].again is shared
    assert [m.layer_name for m in net.modules() if is_sync(m)] == ["0.inner.a", "2"]
    assert tree(revert_sync_batchnorm(net)) == before


def test_layer_names_are_those_in_the_model_given():
    wrapper = nn.Module()  # like DistributedDataParallel
    wrapper.module = network()
    layers = [m for m in wrapper.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    names = ["module.0", "module.1.1", "module.2.1", "module.4"]
    assert [m.layer_name for m in convert_sync_batchnorm(wrapper) and layers] == names
    assert [m.layer_name for m in convert_sync_batchnorm(wrapper.module) and layers] == [n[7:] for n in names]
    assert convert_sync_batchnorm(nn.BatchNorm2d(C)).layer_name is None


def test_the_optimizer_still_drives_the_model():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    convert_sync_batchnorm(net)
    before = [p.detach().clone() for p in net.parameters()]
    net(data()).pow(3).sum().backward()
    optimizer.step()
    assert not any(torch.equal(new, old) for new, old in zip(net.parameters(), before, strict=True))


def test_state_dicts_load_strictly_both_ways():
    plain, converted = randomize(network()), convert_sync_batchnorm(network())
    names, versions = list(plain.state_dict()), plain.state_dict()._metadata
    converted.load_state_dict(plain.state_dict())
    assert (list(converted.state_dict()), converted.state_dict()._metadata) == (names, versions)
    again = network()
    again.load_state_dict(converted.state_dict())
    assert_same_bits([*again.state_dict().values()], [*plain.state_dict().values()])


# --- Parametrized, pruned, lazy, fused


@pytest.mark.parametrize("make", [partial(nn.BatchNorm2d, C), Named, partial(nn.SyncBatchNorm, C)])
def test_parametrizations_in_any_order(make):
    operations = {
        "convert": convert_sync_batchnorm,
        "revert": revert_sync_batchnorm,
        **{
            f"register {n}": partial(parametrize.register_parametrization, tensor_name=n)
            for n in ("weight", "bias")
        },
        **{
            f"remove {n}": partial(parametrize.remove_parametrizations, tensor_name=n)
            for n in ("weight", "bias")
        },
    }
    x = data()
    for order in itertools.permutations(operations):
        pairs = ("convert", "revert"), ("register weight", "remove weight"), ("register bias", "remove bias")
        if any(order.index(first) > order.index(second) for first, second in pairs):
            continue
        layer = randomize(make()).eval()
        kind, expected = type(layer), layer(x)
        for operation in order:
            arguments = {"parametrization": Twice()} if "register" in operation else {}
            operations[operation](layer, **arguments)
            done = order[: order.index(operation) + 1]
            converted = "convert" in done and "revert" not in done
            underneath = parametrize.type_before_parametrizations(layer)
            assert is_sync(layer) == converted
            assert underneath is kind or converted, order
            assert parametrize.is_parametrized(layer, "bias") == (
                "register bias" in done and "remove bias" not in done
            )
            assert_same_bits([layer(x), deepcopy(layer)(x)], [expected] * 2)
        assert type(layer) is kind


def test_a_parametrized_copy_is_converted_alone():
    layer = parametrize.register_parametrization(nn.BatchNorm2d(C), "weight", Twice())
    copy = convert_sync_batchnorm(deepcopy(layer))
    assert is_sync(copy)
    assert not is_sync(layer)
    parametrize.remove_parametrizations(copy, "weight")
    assert parametrize.is_parametrized(layer, "weight")


def test_a_parametrized_layer_is_not_kept_alive():
    layer = convert_sync_batchnorm(parametrize.register_parametrization(nn.BatchNorm2d(C), "weight", Twice()))
    watch = weakref.ref(layer)
    del layer
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("convert_first", [True, False])
def test_weight_norm_trains(convert_first):
    layer = nn.BatchNorm2d(C)
    weight_norm = partial(parametrizations.weight_norm, dim=None)
    for change in (convert_sync_batchnorm, weight_norm)[:: 1 if convert_first else -1]:
        change(layer)
    layer(data()).pow(3).sum().backward()
    assert type(layer).__name__ == "ParametrizedSyncBatchNorm"
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_pruning_survives():
    layer = prune.l1_unstructured(randomize(nn.BatchNorm2d(C)), "weight", amount=1)
    zero = layer.weight == 0
    y = convert_sync_batchnorm(layer)(data())
    prune.remove(revert_sync_batchnorm(layer), "weight")
    assert ((y - layer.bias.view(-1, 1, 1)).abs().amax((0, 2, 3)) == 0).equal(zero)
    assert zero.sum() == (layer.weight == 0).sum() == 1


@pytest.mark.parametrize("kind", [*LAZY, LazyNamed])
@pytest.mark.parametrize("load", [False, True])
def test_lazy(kind, load):
    layer, copy, x = kind(), kind(), data(LAZY.get(kind, 4))
    convert_sync_batchnorm(copy)
    assert type(revert_sync_batchnorm(copy)) is kind
    convert_sync_batchnorm(layer)
    assert is_sync(layer)
    assert isinstance(layer, kind)
    if load:
        layer.load_state_dict(randomize(nn.BatchNorm1d(C)).state_dict())
    layer = pickle.loads(pickle.dumps(layer))
    expected = oracle(x, x, layer.weight if load else None, layer.bias if load else None)
    y = layer(x)
    assert not isinstance(layer, kind)
    assert is_sync(layer)
    assert distance(y, expected.y) < 1e-5
    assert layer.weight.shape == (C,)
    assert layer.num_batches_tracked == 1 + 0 * load
    assert kind is not LazyNamed or isinstance(layer, Named)
    assert type(revert_sync_batchnorm(layer)) is kind.cls_to_become
    copy(x)
    assert type(convert_sync_batchnorm(copy)) is type(convert_sync_batchnorm(layer))
    assert type(revert_sync_batchnorm(copy)) is kind.cls_to_become


@pytest.mark.parametrize(
    "change", [convert_sync_batchnorm, lambda m: revert_sync_batchnorm(convert_sync_batchnorm(m))]
)
def test_fusing_with_a_convolution(change):
    conv, bn = nn.Conv2d(C, C, 1).eval(), randomize(nn.BatchNorm2d(C)).eval()
    x, expected = data(), fusion.fuse_conv_bn_eval(conv, bn)
    assert_same_bits([fusion.fuse_conv_bn_eval(conv, change(bn))(x)], [expected(x)])


# --- Subclasses


@pytest.mark.parametrize("make", [Named, partial(NamedSync, C)])
def test_a_subclass_keeps_all_but_its_forward(make):
    layer, x = make(), data()
    kind = type(layer)
    expected = oracle(x, x)
    y = convert_sync_batchnorm(layer)(x)
    assert is_sync(layer)
    assert isinstance(layer, kind)
    assert distance(y, expected.y) < 1e-5
    assert type(layer) is type(convert_sync_batchnorm(make()))
    assert type(layer).__name__ == f"SyncBatchNorm{kind.__name__}"
    if kind is Named:
        assert (layer.shout(), layer._version) == ("A TITLE", 7)
        assert repr(layer) == repr(Named()).replace("Named(", "SyncBatchNormNamed(")
    assert type(revert_sync_batchnorm(layer)) is kind


def test_a_subclass_of_ours_is_what_its_method_makes():
    net = MySync.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C), Named(), nn.LazyBatchNorm2d()))
    net(data())
    assert type(net[0]) is type(net[2]) is MySync
    assert isinstance(net[1], MySync)
    assert isinstance(net[1], Named)
    convert_sync_batchnorm(net)  # they are synchronized already, and keep the more special class
    assert all(is_sync(layer, MySync) for layer in net)
    revert_sync_batchnorm(net)
    assert [type(layer) for layer in net] == [nn.BatchNorm2d, Named, nn.BatchNorm2d]
    MySync.convert_sync_batchnorm(convert_sync_batchnorm(net))  # to another class than before
    assert all(is_sync(layer, MySync) for layer in net)
    assert [type(layer) for layer in revert_sync_batchnorm(net)] == [nn.BatchNorm2d, Named, nn.BatchNorm2d]


def test_built_synchronized_and_reverted():
    layer = revert_sync_batchnorm(SyncBatchNorm(C, process_group=WORLD))
    assert type(layer) is BatchNorm
    assert "process_group" not in vars(layer)
    for ndim in (2, 3, 4, 5):
        assert layer(data(ndim)).ndim == ndim
    with pytest.raises(
        ValueError, match=re.escape("expected at least 2D input, (N, C, *), got 1D input (on rank")
    ):
        layer(torch.ones(C))
    assert type(convert_sync_batchnorm(layer)) is SyncBatchNorm
    assert type(revert_sync_batchnorm(layer)) is BatchNorm


# --- What is refused


@pytest.mark.parametrize("kind", [OwnForward, OwnForwardByMixin, LazyOwnForward, "instance"])
def test_a_forward_of_its_own_is_refused_by_name(kind):
    layer = nn.BatchNorm2d(C) if kind == "instance" else kind(*() if kind is LazyOwnForward else (C,))
    if kind == "instance":
        layer.forward = torch.relu
    net = nn.ModuleDict({"good": nn.BatchNorm2d(C), "bad": nn.Sequential(Named(), layer)})
    before = tree(net), contents(net)
    name = f"{type(layer).__module__}.{type(layer).__name__}"
    message = (
        f"cannot convert layers whose own forward() would be lost: bad.1 ({name}) (on rank {WORLD.rank} of"
    )
    with pytest.raises(TypeError, match=re.escape(message) + ".*no layer was changed"):
        convert_sync_batchnorm(net)
    assert (tree(net), contents(net)) == before
    with pytest.raises(TypeError, match=re.escape(f"lost: the module itself ({name})")):
        convert_sync_batchnorm(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, C, 1, 1))])
def test_compiled_by_jit_is_refused(compile):
    scripted = compile(nn.Sequential(nn.BatchNorm2d(C)).eval())
    net = nn.Sequential(nn.BatchNorm2d(C), scripted)
    message = f"cannot convert 1.0: it is compiled by torch.jit (on rank {WORLD.rank} of"
    with pytest.raises(TypeError, match=re.escape(message) + ".*before compiling.*no layer was changed"):
        convert_sync_batchnorm(net)
    assert type(net[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match="cannot convert the module itself"):
        convert_sync_batchnorm(getattr(scripted, "0"))


def test_a_wrong_group_changes_nothing():
    net = nn.Sequential(nn.BatchNorm2d(C))
    with pytest.raises(TypeError, match="process_group must be"):
        convert_sync_batchnorm(net, "world")
    assert type(net[0]) is nn.BatchNorm2d


# --- Copies


def torch_save(module):
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copy", [deepcopy, torch_save, *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in (1, 5))]
)
@pytest.mark.parametrize("group", [None, WORLD])
def test_copies(copy, group):
    net = convert_sync_batchnorm(nn.Sequential(network(), NamedSync(C)), group)
    twin = copy(net)
    assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
    assert all(one is not other for one, other in zip(twin.parameters(), net.parameters(), strict=True))
    assert all(
        m.process_group is n.process_group
        for m, n in zip(twin.modules(), net.modules(), strict=True)
        if is_sync(m)
    )
    assert not any(is_sync(m) for m in revert_sync_batchnorm(twin).modules())
    assert is_sync(net[0][0])
    assert type(twin[1]) is NamedSync


def test_a_private_group_is_shared_by_copies_and_refuses_to_pickle():
    group = mpisyncbn.new_subgroups(1)
    net = convert_sync_batchnorm(network(), group)
    twin = deepcopy(net)
    with pytest.raises(
        TypeError, match=r"private group exists only in this run.*state_dict.*process_group to None"
    ):
        pickle.dumps(net)
    group.free()
    assert twin[0].process_group is twin[1][1].process_group is group
    assert pickle.dumps(convert_sync_batchnorm(net))


# --- What it computes


def test_converting_again_hands_over_the_group():
    group = mpisyncbn.new_subgroups(1)
    net, x = network(), data()
    alone = step(deepcopy(net), x)
    converted = step(convert_sync_batchnorm(convert_sync_batchnorm(net), group), x)
    group.free()
    assert all(m.process_group is group for m in net.modules() if is_sync(m))
    torch.testing.assert_close(converted, alone, rtol=1e-3, atol=1e-4)
    convert_sync_batchnorm(net)
    assert all(m.process_group is None for m in net.modules() if is_sync(m))


def test_the_ranks_compute_what_one_computes_of_the_whole_batch():
    net, x = randomize(network()).double(), data(dtype=torch.float64)
    whole_x = torch.cat(shards := WORLD.allgather(x.detach())).requires_grad_()
    expected = deepcopy(net)
    y, dx, *gradients_and_state = step(convert_sync_batchnorm(net), x)
    whole_y, whole_dx, *whole = step(expected, whole_x)
    parameters = len([*net.parameters()])
    gradients = [sum(WORLD.allgather(g)) for g in gradients_and_state[:parameters]]
    start = sum(map(len, shards[: WORLD.rank]))
    mine = slice(start, start + len(x))
    assert distance(y, whole_y[mine]) < 1e-12
    assert distance(dx, whole_dx[mine], whole_dx) < 1e-11
    for one, other in zip([*gradients, *gradients_and_state[parameters:]], whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_reverted_computes_what_the_plain_model_does():
    net, x = randomize(network()), data()
    plain = deepcopy(net)
    convert_sync_batchnorm(net)
    net.load_state_dict(plain.state_dict())
    revert_sync_batchnorm(net)
    for _ in range(2):
        assert_same_bits(step(net, x), step(plain, x))


# --- Any model

LAYERS = [
    *(partial(kind, C, **options) for kind, options in zip(NDIM, OPTIONS, strict=False)),
    *LAZY,
    *(Named, LazyNamed, partial(NamedSync, C)),
    lambda: parametrize.register_parametrization(Named(), "weight", Twice()),
    *(partial(nn.InstanceNorm2d, C), partial(nn.GroupNorm, 1, C), partial(nn.Linear, C, C), nn.Identity),
]


@given(
    st.recursive(st.integers(0, len(LAYERS) - 1), partial(st.lists, max_size=4), max_leaves=12),
    st.booleans(),
    st.sampled_from([SyncBatchNorm, MySync]),
)
def test_any_model_there_and_back(spec, twice, to):
    pool = [make() for make in LAYERS]

    def build(spec):  # the same number again is the same layer again
        return pool[spec] if isinstance(spec, int) else nn.Sequential(*map(build, spec))

    def kinds(net):
        return [parametrize.type_before_parametrizations(m) for m in net.modules()]

    net = build(spec)
    places, before, classes = [entry[:2] for entry in tree(net)], contents(net), kinds(net)
    with together():
        for _ in range(1 + twice):
            to.convert_sync_batchnorm(net)
        assert [entry[:2] for entry in tree(net)] == places
        assert contents(net)[1] == before[1]
        for module, kind in zip(net.modules(), classes, strict=True):
            batch_norm = issubclass(kind, nn.modules.batchnorm._BatchNorm)
            assert is_sync(module, to) if batch_norm else type(module) is kind
        revert_sync_batchnorm(net)
        assert [entry[:2] for entry in tree(net)] == places
        assert contents(net) == before
        assert kinds(net) == classes
