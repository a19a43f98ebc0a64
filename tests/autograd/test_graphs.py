"""Derivatives of compiled, traced and exported layers are those of the eager layer, or an error."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config
from functorch.compile import aot_module, nop
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import mpisyncbn
from mpisyncbn.comm.groups import resolve
from support.oracle import distance, local_batch, shard
from support.ranks import up_to_two
from support.versions import before_2_15, compiler_tests, compiles

BACKEND = "aot_eager"
pytestmark = [up_to_two, compiles, *compiler_tests]
REFUSED = "expected no transform of torch.func"


def layer(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return mpisyncbn.sync_batch_norm(x, None, None, weight, weight)


def loss(x: Tensor, weight: Tensor, factor: float = 1.0) -> Tensor:
    # with the factor, the layer's input is computed in the function, as behind other layers
    return (layer(x if factor == 1.0 else x * factor, weight) ** 3).sum()


def gradients(function, x: Tensor, weight: Tensor):
    return torch.func.grad(function, (0, 1))(x, weight)


def tangent(function, x: Tensor, weight: Tensor):
    return torch.func.jvp(function, (x, weight), (x * 0.5, weight + 1))


def second(function, x: Tensor, weight: Tensor):
    def squares(x: Tensor, weight: Tensor) -> Tensor:
        return sum((each * each).sum() for each in gradients(function, x, weight))

    return torch.func.grad(squares, (0, 1))(x, weight)


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("transform", [gradients, tangent, second])
def test_torch_func_with_the_compiler(transform, factor):
    x, weight = shard((local_batch(4), 3), 1), torch.tensor([0.5, 2.0, -1.0])

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return loss(x, weight, factor)

    def transformed(x: Tensor, weight: Tensor):
        return transform(function, x, weight)

    expected = transform(function, x, weight)
    outside = transform(torch.compile(function, backend=BACKEND), x, weight)
    inside = torch.compile(transformed, backend=BACKEND)(x, weight)
    for found in (outside, inside):
        assert max(distance(f, e, torch.ones(1)) for f, e in zip(found, expected, strict=True)) < 1e-5
    torch._dynamo.reset()  # it would not try these functions again
    with pytest.raises(Exception, match=REFUSED):
        torch.compile(transformed, backend=BACKEND, fullgraph=True)(x, weight)


def test_a_compiled_layer_works_after_torch_func():
    """Code that was compiled while torch.func was active is not used for other calls."""
    net = mpisyncbn.SyncBatchNorm(3, track_running_stats=False)
    compiled, x = torch.compile(net, backend=BACKEND), shard((local_batch(4), 3), 2).requires_grad_()
    torch.func.jvp(compiled, (x,), (x,))
    torch.func.grad(lambda x: compiled(x).pow(3).sum())(x)
    found, expected = (torch.autograd.grad(f(x).pow(3).sum(), x)[0] for f in (compiled, net))
    assert distance(found, expected, torch.ones(1)) < 1e-5


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_exchange(mode, pre_dispatch):
    x, later = shard((local_batch(4), 3), 3), shard((local_batch(4), 3), 4)
    graph = make_fx(lambda x: layer(x), tracing_mode=mode, pre_dispatch=pre_dispatch)(x)
    assert distance(graph(later), layer(later)) < 1e-5


@before_2_15
def test_a_recorded_graph_gives_running_statistics_no_history():
    net, x = mpisyncbn.SyncBatchNorm(3), shard((local_batch(4), 3), 3)
    make_fx(net)(x)(x.clone().requires_grad_())
    assert not any(buffer.requires_grad for buffer in net.buffers())


def test_make_fx_of_derivatives():
    x, later = shard((local_batch(4), 3), 5), shard((local_batch(4), 3), 6)

    def step(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(layer(leaf).pow(3).sum(), leaf)[0]

    assert distance(make_fx(step)(x)(later), step(later), torch.ones(1)) < 1e-5
    with pytest.raises(mpisyncbn.MPISyncBNError, match=REFUSED):
        make_fx(torch.func.grad(lambda x: layer(x).pow(3).sum()))(x)

    def twice(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    with pytest.raises(mpisyncbn.MPISyncBNError, match="expected no gradients through batch stat"):
        make_fx(twice)(x)
    with pytest.raises(NotImplementedError, match="jvp"):  # it traces a tangent
        torch.func.linearize(layer, x)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_does_not_train(strict):
    x = shard((local_batch(4), 3), 7)
    net = nn.Sequential(nn.Linear(3, 3), mpisyncbn.SyncBatchNorm(3))
    exported = torch.export.export(net, (x,), strict=strict).module()
    with torch.no_grad():
        assert distance(exported(x), net(x)) < 1e-5
    assert distance(exported(x).detach(), net(x).detach()) < 1e-5
    assert not any(buffer.requires_grad for buffer in exported.buffers())
    with pytest.raises(RuntimeError, match=r"expected no gradients through batch stat|does not require grad"):
        exported(x.clone().requires_grad_()).sum().backward()
    with pytest.raises(Exception, match=r"expected no gradients through batch stat|does not require grad"):
        torch.compile(exported, backend=BACKEND)(x.clone().requires_grad_()).sum().backward()


def test_aot_module_trains():
    """functorch's compiler calls the layer with tensors that have no values."""
    net = nn.Sequential(nn.Linear(3, 3), mpisyncbn.SyncBatchNorm(3)).double()
    x, gradients = shard((local_batch(4), 3), 8, dtype=torch.float64), []
    for forward in (net, aot_module(net, nop)):
        net.zero_grad()
        forward(x).pow(3).sum().backward()
        gradients.append(net[0].weight.grad.clone())
    assert distance(*gradients, torch.ones(1)) < 1e-10


@pytest.mark.parametrize("option", [{"activation_memory_budget": 0.5}, {"aggressive_recomputation": True}])
def test_less_memory_repeats_no_exchange(option):
    """The compiler repeats other work in the backward pass, here that of two forward passes."""
    net = nn.Sequential(*[each for _ in range(2) for each in (nn.Linear(3, 3), mpisyncbn.SyncBatchNorm(3))])
    compiled, before = torch.compile(net, backend="aot_eager_decomp_partition"), resolve(None).exchanges
    with torch._functorch.config.patch(option):
        sum(compiled(shard((local_batch(4), 3), seed)).square().sum() for seed in (9, 10)).backward()
    assert resolve(None).exchanges - before == 8  # each layer twice, forward and backward


def test_a_graph_is_traced_once():
    """torch makes symbols of the values of some tensors, and then traces the graph again."""
    counter, x = CompileCounterWithBackend(BACKEND), shard((local_batch(4), 3), 11)
    torch.compile(mpisyncbn.SyncBatchNorm(3), backend=counter)(x)
    assert counter.frame_count == 1


def test_gradients_batched_by_the_older_vmap_are_refused():
    x = shard((local_batch(4), 3), 12)
    with pytest.raises(mpisyncbn.MPISyncBNError, match=r"nor vectorize of torch.autograd.functional.*jacrev"):
        torch.autograd.functional.jacobian(layer, x, vectorize=True)
