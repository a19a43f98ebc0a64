"""A layer compiled in one graph has the eager results and makes all exchanges."""

from __future__ import annotations

import copy
import itertools
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mpisyncbn
from mpisyncbn import exchange
from mpisyncbn.comm.groups import resolve
from support.jobs import run_alone
from support.oracle import distance, shard
from support.ranks import WORLD, up_to_two
from support.versions import compiler_tests, compiles, since_2_12

# These are tests of tracing. "aot_eager" splits and functionalizes the graph as Inductor does, in a
# tenth of the time. One test uses Inductor.
BACKEND = "aot_eager"
pytestmark = [up_to_two, compiles, *compiler_tests]
slow = pytest.mark.full("torch's compiler takes its time")


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)
    )
    return mpisyncbn.convert_sync_batchnorm(net)


def train(net, forward, steps: int, dtype: torch.dtype = torch.float32):
    """Train, and return the outputs, the gradients of the parameters, and the buffers."""
    outputs = []
    for step in range(steps):
        y = forward(shard((2 + WORLD.rank + step, 2, 6, 6), step, dtype=dtype))
        y.float().square().mean().backward()
        outputs.append(y.detach())
    return outputs, [p.grad for p in net.parameters()], list(net.buffers())


def test_fullgraph_training_is_the_same():
    """Uneven batches have another size at each step.

    The compiler first takes static shapes, then dynamic ones.
    """
    eager, net = model(), model()
    expected = train(eager, eager, 3)
    got = train(net, torch.compile(net, fullgraph=True, backend=BACKEND), 3)
    for a, b in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
        assert distance(a, b, b.abs().max().double().clamp_min(1.0)) < 1e-5


@slow
@pytest.mark.parametrize(("dynamic", "momenta"), [(True, (0.1, 0.3, 1.0, 0.7)), (None, [torch.tensor(0.25)])])
def test_a_momentum_that_changes_or_is_a_tensor(dynamic, momenta):
    """The compiler makes a symbol of a momentum that changes. Fake tensors have no value."""
    layer = mpisyncbn.SyncBatchNorm(3)
    eager, x = copy.deepcopy(layer), shard((3 + WORLD.rank, 3), 1, 2.0)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=BACKEND)
    for momentum in momenta:
        layer.momentum = eager.momentum = momentum
        compiled(x)
        eager(x)
    assert distance(layer.running_mean, eager.running_mean) < 1e-6
    assert distance(layer.running_var, eager.running_var) < 1e-6
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = mpisyncbn.SyncBatchNorm(3, momentum=momenta[0])(torch.zeros(2, 3))
    assert y.shape == (2, 3)


def forwards(layer, forward, x):
    """Run several forward passes, and two backward passes of the first two.

    Return the gradients of x, weight and bias, and the running statistics.
    """
    x = x.clone().requires_grad_()
    first, second = forward(x), forward(x + 1)
    with torch.no_grad():
        forward(x + 2)
    loss = first.pow(3).sum() + second.pow(2).mul(second.sin()).sum()
    loss.backward(retain_graph=True)
    forward(x)
    loss.backward()
    return [x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]


def same(got, expected) -> bool:
    return all(distance(a, b, b.abs().clamp_min(1.0)) < 2e-5 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "kind", ["layer", *(pytest.param(each, marks=slow) for each in ("function", "two groups", "graph break"))]
)
def test_several_forwards_before_a_backward(kind):
    layer, other = mpisyncbn.SyncBatchNorm(3), mpisyncbn.SyncBatchNorm(3)
    if kind == "two groups":
        other.process_group = mpisyncbn.new_subgroups(1)

    def function(x):
        if kind == "function":
            return mpisyncbn.sync_batch_norm(
                x, layer.running_mean, layer.running_var, layer.weight, layer.bias
            )
        y = layer(x)
        if kind == "graph break":
            torch._dynamo.graph_break()
        return y if kind == "layer" else y.sin() + other(x)

    eager = copy.deepcopy(layer.state_dict())
    x = shard((5 + WORLD.rank, 3), 1)
    compiled = torch.compile(function, fullgraph=kind != "graph break", backend=BACKEND)
    got = [value.clone() for value in forwards(layer, compiled, x)]
    layer.load_state_dict(eager)
    layer.zero_grad()
    assert same(got, forwards(layer, function, x))


@slow
def test_graphs_that_take_turns():
    """Layers are compiled one by one, and a compiled net runs twice for one loss, as in a GAN."""

    def gradients(compiled):
        torch.manual_seed(0)
        layers = nn.Sequential(
            mpisyncbn.SyncBatchNorm(3), nn.Linear(3, 3), mpisyncbn.SyncBatchNorm(3)
        ).double()
        net = nn.Sequential(nn.Linear(3, 4), mpisyncbn.SyncBatchNorm(4)).double()
        first, last, judge = compiled(layers[0]), compiled(layers[2]), compiled(net)
        x = shard((5 + WORLD.rank, 3), 1, dtype=torch.float64)
        y = last(layers[1](first(x)).sin()).exp()
        (judge(x).sin().sum() - judge(y.detach()).pow(3).sum()).backward()
        (judge(y).pow(3).sum() + judge(y[1:]).sin().sum()).backward()  # another shape: compiled again
        return [p.grad for p in (*layers.parameters(), *net.parameters())]

    assert same(gradients(lambda net: torch.compile(net, backend=BACKEND)), gradients(lambda net: net))


@slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++, and there is no g++")
def test_all_the_way_to_machine_code(monkeypatch):
    """Results are right, and all exchanges happen in order, even those with unused results."""
    layers = nn.ModuleList(mpisyncbn.SyncBatchNorm(2) for _ in range(3))
    calls = []

    def watched(original):
        return lambda group, call, *rest: (calls.append(call), original(group, call, *rest))[1]

    for name in ("merge_moments", "reduce_sums"):
        monkeypatch.setattr(exchange, name, watched(getattr(exchange, name)))

    def function(x):
        layers[0](x)  # its result is not used
        return layers[2](x * 3).relu() + layers[1](x) * layers[2](x * 3)

    x, results = shard((4 + WORLD.rank, 2, 3), 1).requires_grad_(), []
    for forward in (function, torch.compile(function, fullgraph=True)):
        x.grad = None
        calls.clear()
        y = forward(x), forward(x + 1)
        (y[0].square().sum() + y[1].pow(3).sum()).backward()
        results.append((*y, x.grad, [(call.layer, call.direction) for call in calls]))
    *values, order = zip(*results, strict=True)
    assert order[0] == order[1]
    for eager, compiled in values:
        assert distance(compiled.detach(), eager.detach()) < 1e-5


@slow
@since_2_12
def test_evaluation_and_training_before_one_backward():
    """The gradient of evaluation uses the statistics of its forward pass.

    The graph is split as Inductor splits it: the backward pass computes cheap operations again.
    """

    def as_it_is(graph, inputs):
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=as_it_is, bw_compiler=as_it_is, partition_fn=min_cut_rematerialization_partition
    )
    layer, x = mpisyncbn.SyncBatchNorm(3), shard((4, 3), 1).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    expected = torch.autograd.grad(nn.functional.batch_norm(x, torch.zeros(3), torch.ones(3)).sum(), x)[0]
    y = compiled.eval()(x)
    compiled.train()(shard((2 + WORLD.rank, 3), 2, 5.0))
    y.sum().backward()
    assert distance(x.grad, expected) < 1e-6


@slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    layer = mpisyncbn.SyncBatchNorm(2, dtype=torch.float64 if dtype == torch.float64 else None)
    eager = copy.deepcopy(layer)
    results = []
    for net, forward in ((layer, torch.compile(layer, fullgraph=True, backend=BACKEND)), (eager, eager)):
        x = shard((3 + WORLD.rank, 2, 3), 1, 2.0, dtype).requires_grad_()
        y = forward(x)
        y.float().pow(3).sum().backward()
        results.append((y.detach(), x.grad, net.running_var))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert distance(a, b) < (1e-12 if dtype == torch.float64 else 2e-2)


def test_no_exchange_is_dropped_or_merged():
    """A call with an unused result and two calls on the same input all make their exchanges."""
    layer = mpisyncbn.SyncBatchNorm(3)

    def function(x):
        layer(x)
        return layer(x) + layer(x)

    x = shard((2 + WORLD.rank, 3), 1).requires_grad_()
    before = resolve(None).exchanges
    torch.compile(function, fullgraph=True, backend=BACKEND)(x).square().sum().backward()
    counts = [resolve(None).exchanges - before]
    x.grad = None
    function(x).square().sum().backward()
    counts.append(resolve(None).exchanges - before - counts[0])
    assert counts == [5, 5]
    assert layer.num_batches_tracked == 6


@slow
def test_one_rank_may_be_compiled_and_another_not():
    """The compiler may give up on one rank alone. The layer has the same name, compiled or not."""
    layer = mpisyncbn.SyncBatchNorm(3)
    forward = torch.compile(layer, backend=BACKEND) if WORLD.rank == 0 else layer
    for step in range(2):
        x = shard((2 + WORLD.rank, 3), step).requires_grad_()
        forward(x).square().sum().backward()
    assert layer.num_batches_tracked == 2


def test_errors_under_compilation():
    layer = mpisyncbn.SyncBatchNorm(3)
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    with pytest.raises(Exception, match=r"expected weight of shape \(4,\)"):
        compiled(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.compile(layer, backend=BACKEND)(shard((1 if WORLD.rank == 0 else 0, 3), 1))
    assert layer.num_batches_tracked == 0
    function = torch.compile(
        lambda x: mpisyncbn.sync_batch_norm(x, None, None, process_group=WORLD),
        fullgraph=True,
        backend=BACKEND,
    )
    with pytest.raises(Exception, match="in a compiled function, got an mpi4py"):
        function(torch.zeros(2, 4))


@slow
def test_the_first_import_may_happen_in_any_mode():
    """The import makes the tensors that order exchanges. They are ordinary tensors in any mode.

    So they are in a function that torch.func transforms.
    """
    out = run_alone("""
import torch, warnings
from torch._subclasses.fake_tensor import FakeTensorMode

def function(x):
    with torch.device("meta"), torch.inference_mode(), FakeTensorMode():
        import mpisyncbn.autograd.compiled
    return x.sum()

torch.func.grad(function)(torch.ones(2))
from mpisyncbn.autograd.compiled import _BACKWARD_ORDER, _FORWARD_ORDER
for token in (_FORWARD_ORDER, _BACKWARD_ORDER):
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(token)
    print(type(token) is torch.Tensor, token.device, token.is_inference(), wrapped)
""")
    assert out.split() == ["True", "cpu", "False", "False"] * 2


def test_groups():
    group = mpisyncbn.new_subgroups(1)
    layer = mpisyncbn.SyncBatchNorm(3, momentum=1.0, process_group=group)
    x = shard((4, 3), 1)
    torch.compile(layer, fullgraph=True, backend=BACKEND)(x)
    assert distance(layer.running_mean, x.mean(0)) < 1e-6


@slow
def test_empty_and_not_finite_batches_stay_out_of_the_running_statistics():
    layer = mpisyncbn.SyncBatchNorm(3)
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    for x in (torch.zeros(0, 3), torch.full((2, 3), float("inf"))):
        torch._dynamo.reset()
        compiled(x)
        assert torch.equal(layer.running_mean, torch.zeros(3))
        assert layer.num_batches_tracked == 0


def everything_again(context, operation, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


def context_of(*chosen):
    """Return a new ``context_fn`` for torch's ``checkpoint``, which makes the contexts."""
    return lambda: create_selective_checkpoint_contexts(*chosen)


@slow
@pytest.mark.parametrize("kind", ["inside", "outside", "some operations", "every operation"])
def test_checkpointing(kind):
    """A checkpoint inside a graph or around it updates the running statistics once.

    A graph that contains the checkpoint keeps the results of its exchanges, without a repetition.
    """
    net, eager = model(), model()
    x = shard((2 + WORLD.rank, 2, 6, 6), 1)
    compiling = {"fullgraph": True, "backend": BACKEND}
    options = {"use_reentrant": False}
    if kind == "some operations":
        options["context_fn"] = context_of([torch.ops.aten.convolution.default])
    if kind == "every operation":
        options["context_fn"] = context_of(everything_again)
    if kind == "outside":
        compiled = torch.compile(net, **compiling)
        forward = lambda x: checkpoint(compiled, x, **options)  # noqa: E731
    else:
        forward = torch.compile(lambda x: checkpoint(net, x, **options), **compiling)
    before = resolve(None).exchanges
    (forward(x).square().mean() + forward(x + 1).square().mean()).backward()
    assert resolve(None).exchanges - before == (12 if kind == "outside" else 8)
    (eager(x).square().mean() + eager(x + 1).square().mean()).backward()
    for a, b in zip(net.buffers(), eager.buffers(), strict=True):
        assert distance(a, b, torch.ones(1)) < 1e-5
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        assert distance(a.grad, b.grad, torch.ones(1)) < 1e-5


def test_the_operations_are_well_described():
    """The operations pass torch's checks: schema, fake results, in-place changes, compilation."""
    x, token, call = torch.randn(2, 3, 5), torch.zeros(()), ("", "a layer", "float32", 1e-5)
    stats, ones = torch.ones(3, 3).double(), torch.ones(3)
    for mask in (None, torch.tensor([[[True, False, True, True, False]], [[False] * 5]])):
        torch.library.opcheck(torch.ops.mpisyncbn.batch_stats.default, (x, mask, token, *call))
        sums = torch.ops.mpisyncbn.batch_sums.default
        torch.library.opcheck(sums, (x, x, mask, stats, stats.new_tensor(10), token, *call))
    torch.library.opcheck(torch.ops.mpisyncbn.keep.default, (ones.double(), ones))


def test_shapes_without_data():
    """A layer on meta or fake tensors gives the right shape, and sends nothing."""
    before = resolve(None).exchanges
    meta = mpisyncbn.SyncBatchNorm(3, device="meta")
    y = meta(torch.zeros(2, 3, 4, device="meta"))
    with FakeTensorMode():
        fake = mpisyncbn.SyncBatchNorm(3)(torch.zeros(2, 3, 4))
    assert y.is_meta
    assert y.shape == fake.shape == (2, 3, 4)
    assert resolve(None).exchanges == before
