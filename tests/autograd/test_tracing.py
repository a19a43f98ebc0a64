"""torch.fx takes a layer as one step, as torch's. torch.jit can only trace evaluation."""

from __future__ import annotations

import copy
import operator
import re

import pytest
import torch
from torch import nn
from torch.fx import Interpreter, Tracer, Transformer, symbolic_trace
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from mpisyncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from mpisyncbn.comm.groups import resolve
from support.models import C, Named, Twice, data, equal, step
from support.ranks import no_exchange

# torch.jit warns that it is deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), SyncBatchNorm(C, activation="relu")

    def forward(self, x):
        return self.bn(self.conv(x), residual=x)


def network():
    torch.manual_seed(0)
    scaled = parametrize.register_parametrization(nn.BatchNorm2d(C), "weight", Twice())
    fused = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())
    net = nn.Sequential(Block(), fused, Named(), scaled, nn.BatchNorm2d(C), nn.LazyBatchNorm2d())
    return convert_sync_batchnorm(net, fuse_relu=True)


TARGETS = ["0.conv", "0.bn", "1.0", "1.1", "1.2", "2", "3", "4", "5"]


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_one_step_of_a_graph(training):
    net, x, calls = network(), data(), []
    lazy = targets(symbolic_trace(net).graph)
    net(x)
    net[4].register_forward_pre_hook(lambda *_: calls.append("before"))
    net[4].register_forward_hook(lambda *_: calls.append("after"))
    net.train(training)
    before = resolve(None).exchanges
    graph = symbolic_trace(net)
    silent = resolve(None).exchanges == before and not calls
    twin, again = copy.deepcopy(graph), symbolic_trace(copy.deepcopy(graph))
    expected = step(copy.deepcopy(net), x)
    calls.clear()
    got = step(graph, x)
    hooks = list(calls)
    others = step(twin, x), step(again, x)
    assert silent
    assert lazy == TARGETS
    assert targets(graph.graph) == targets(again.graph) == TARGETS
    assert graph.get_submodule("0.bn") is net[0].bn
    assert hooks == ["before", "after"]
    assert all(equal(each, expected) for each in (got, *others))


def test_a_graph_is_reverted_and_converted():
    net, x = network(), data()
    net(x)
    net = net[1:].eval()
    graph = symbolic_trace(net)
    plain = revert_sync_batchnorm(copy.deepcopy(graph))
    kinds = [type(plain.get_submodule(name)) for name in ("1.1", "1.2", "2", "4")]
    y = plain(x)
    again = convert_sync_batchnorm(plain)(x)
    assert kinds == [nn.BatchNorm2d, nn.ReLU, Named, nn.BatchNorm2d]
    assert torch.allclose(y, graph(x), atol=1e-6)
    assert torch.allclose(again, y, atol=1e-6)
    assert isinstance(plain.get_submodule("1.1"), SyncBatchNorm)


def test_tools_built_on_tracing():
    """Feature extraction by another tracer, interpretation, transformation and fusion work."""

    class Places(Tracer):  # like torchvision's
        def call_module(self, module, forward, args, kwargs):
            places.append(self.path_of_module(module))
            return super().call_module(module, forward, args, kwargs)

    places = []
    net, x = network(), data()
    net(x)
    graph = torch.fx.GraphModule(net, Places().trace(net))
    outer = graph.graph
    feature = next(node for node in outer.nodes if node.target == "0.bn")
    (output,) = (node for node in outer.nodes if node.op == "output")
    output.args = (feature,)
    outer.eliminate_dead_code()
    graph.recompile()
    before = resolve(None).exchanges
    y = graph(x)
    sent = resolve(None).exchanges - before
    net.eval()
    whole = symbolic_trace(net)
    results = [
        whole(x),
        Interpreter(whole).run(x),
        Transformer(whole).transform()(x),
        ShapeProp(whole).propagate(x),
    ]
    fused = fuse(revert_sync_batchnorm(net[1]))
    assert set(TARGETS) <= set(places)
    assert targets(outer) == ["0.conv", "0.bn"]
    assert (y >= 0).all()
    assert sent == 1
    assert all(torch.equal(result, net(x)) for result in results[:-1])
    assert [type(module) for module in fused.children()] == [nn.Conv2d, nn.ReLU]


def test_a_function_that_is_traced_with_the_layer_at_two_places():
    shared = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C)))[0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = shared

        def forward(self, x):
            return operator.add(self.bn(x), self.bn(input=x))

    graph = symbolic_trace(Net().eval())
    assert targets(graph.graph) == ["bn", "bn"]
    x = data()
    assert torch.equal(graph(x), shared(x) * 2)


@no_exchange
def test_torch_jit_is_told_to_revert():
    net, x = network(), data()
    net(x)
    layer = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C)), name="G")
    message = re.escape("sends to other ranks: G: 0 (on rank 0 of 1). Revert the model or a copy of it first")
    for compile_it in (lambda: torch.jit.trace(layer, x), lambda: torch.jit.script(layer)):
        with pytest.raises(TypeError, match=f"torch.jit.(trace|script) cannot compile .* {message}"):
            compile_it()
    for training in (True, False):
        with pytest.raises(TypeError, match=r"torch.jit.script cannot compile .*revert_sync_batchnorm\("):
            torch.jit.script(net.train(training))
    with pytest.raises(TypeError, match=r"torch.jit.trace cannot compile .*to other ranks \(on rank"):
        torch.jit.trace(SyncBatchNorm(C), x)
    expected = net(x)  # torch.jit can trace evaluation
    assert torch.equal(torch.jit.trace(net, x)(x), expected)
    assert isinstance(layer[0], SyncBatchNorm)
    plain = revert_sync_batchnorm(net[1:3])
    expected = plain(x)
    for compiled in (torch.jit.trace(plain, x), torch.jit.script(plain)):
        assert torch.allclose(compiled(x), expected)
    alone = revert_sync_batchnorm(SyncBatchNorm(C)).eval()
    assert torch.equal(torch.jit.script(alone)(x), alone(x))
