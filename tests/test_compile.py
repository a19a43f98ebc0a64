"""torch.compile in one graph: the same numbers, and every exchange, whatever the compiler thinks of it."""

from __future__ import annotations

import copy
import itertools
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from parallel import WORLD, distance, shard
from singleton import run_alone
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mpisyncbn
from mpisyncbn.communicator import resolve

# Tracing is what is tested; "aot_eager" splits and functionalizes the graph as Inductor does, in a
# tenth of the time. One test goes all the way.
BACKEND = "aot_eager"
# torch's compiler warns about itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)
    )
    return mpisyncbn.convert_sync_batchnorm(net)


def train(net, forward, steps: int, dtype: torch.dtype = torch.float32):
    """The outputs, and what the model was left with."""
    outputs = []
    for step in range(steps):
        y = forward(shard((2 + WORLD.rank + step, 2, 6, 6), step, dtype=dtype))
        y.float().square().mean().backward()
        outputs.append(y.detach())
    return outputs, [p.grad for p in net.parameters()], list(net.buffers())


def test_fullgraph_training_is_the_same():
    """Uneven batches that change from step to step: static shapes first, then dynamic ones."""
    eager, net = model(), model()
    expected = train(eager, eager, 3)
    got = train(net, torch.compile(net, fullgraph=True, backend=BACKEND), 3)
    for a, b in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
        assert distance(a, b, b.abs().max().double().clamp_min(1.0)) < 1e-5


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++, and there is no g++")
def test_all_the_way_to_machine_code():
    layer, x = mpisyncbn.SyncBatchNorm(2), shard((2 + WORLD.rank, 2, 3), 1).requires_grad_()
    y = torch.compile(layer, fullgraph=True)(x).relu()
    y.square().sum().backward()
    compiled, x.grad = x.grad, None
    expected = copy.deepcopy(layer)(x).relu()
    expected.square().sum().backward()
    assert distance(y.detach(), expected.detach()) < 1e-6
    assert distance(compiled, x.grad) < 1e-5


def test_evaluation_and_training_before_one_backward():
    """Split as Inductor splits, which computes cheap operations a second time in the backward."""

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


def test_a_momentum_that_is_a_tensor():
    """It stays one in the graph, and on fake tensors, where it has no value to be looked at."""
    layer, x = mpisyncbn.SyncBatchNorm(3, momentum=torch.tensor(0.25)), shard((4, 3), 1, 2.0)
    eager = copy.deepcopy(layer)
    torch.compile(layer, fullgraph=True, backend=BACKEND)(x)
    eager(x)
    assert distance(layer.running_var, eager.running_var) < 1e-6
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = mpisyncbn.SyncBatchNorm(3, momentum=torch.tensor(0.25))(torch.zeros(2, 3))
    assert y.shape == (2, 3)


def test_no_exchange_is_dropped_or_merged():
    """An unused result, and the same layer twice on the same input."""
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


def test_one_rank_may_be_compiled_and_another_not():
    """So it is where the compiler gives up on one rank: the layer has one name either way."""
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
    function = torch.compile(
        lambda x: mpisyncbn.sync_batch_norm(x, None, None, process_group=WORLD),
        fullgraph=True,
        backend=BACKEND,
    )
    with pytest.raises(Exception, match="in a compiled function, got an mpi4py"):
        function(torch.zeros(2, 4))


def test_the_first_import_may_happen_in_any_mode():
    """The token is made then, and must be an ordinary tensor all the same."""
    out = run_alone("""
import torch, warnings
from torch._subclasses.fake_tensor import FakeTensorMode
with torch.device("meta"), torch.inference_mode(), FakeTensorMode():
    from mpisyncbn.autograd import _TOKEN
print(type(_TOKEN) is torch.Tensor, _TOKEN.device, _TOKEN.is_inference())
""")
    assert out.split() == ["True", "cpu", "False"]


def test_groups():
    group = mpisyncbn.new_subgroups(1)
    layer = mpisyncbn.SyncBatchNorm(3, momentum=1.0, process_group=group)
    x = shard((4, 3), 1)
    torch.compile(layer, fullgraph=True, backend=BACKEND)(x)
    assert distance(layer.running_mean, x.mean(0)) < 1e-6


def test_empty_and_not_finite_batches_stay_out_of_the_running_statistics():
    layer = mpisyncbn.SyncBatchNorm(3)
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    for x in (torch.zeros(0, 3), torch.full((2, 3), float("inf"))):
        torch._dynamo.reset()
        compiled(x)
        assert torch.equal(layer.running_mean, torch.zeros(3))
        assert layer.num_batches_tracked == 0


def test_one_value_per_channel_is_refused():
    layer = mpisyncbn.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.compile(layer, backend=BACKEND)(shard((1 if WORLD.rank == 0 else 0, 3), 1))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing(inside):
    """Inside the graph and around it: the statistics are updated once."""
    net, eager = model(), model()
    x = shard((2 + WORLD.rank, 2, 6, 6), 1)
    compiling = {"fullgraph": True, "backend": BACKEND}
    if inside:
        forward = torch.compile(lambda x: checkpoint(net, x, use_reentrant=False), **compiling)
        y = forward(x)
    else:
        y = checkpoint(torch.compile(net, **compiling), x, use_reentrant=False)
    y.square().mean().backward()
    eager(x).square().mean().backward()
    for a, b in zip(net.buffers(), eager.buffers(), strict=True):
        assert distance(a, b, torch.ones(1)) < 1e-5
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        assert distance(a.grad, b.grad, torch.ones(1)) < 1e-5


def test_the_operations_are_well_described():
    """torch's own checks of schema, fake results and what is changed in place."""
    ones, token, call = torch.ones(3).double(), torch.zeros(()), ("", "a layer")
    checks = ("test_schema", "test_faketensor")
    merge, reduce = torch.ops.mpisyncbn.merge_moments.default, torch.ops.mpisyncbn.reduce_sums.default
    torch.library.opcheck(merge, (ones, ones, 4, token, *call, "float32", 1e-5), test_utils=checks)
    torch.library.opcheck(reduce, (ones, token, *call, "backward", "float32", 1e-5), test_utils=checks)
    torch.library.opcheck(torch.ops.mpisyncbn.keep.default, (ones, ones.float()))


def test_shapes_without_data():
    """Meta and fake tensors: shapes and dtypes come out, nothing is sent."""
    before = resolve(None).exchanges
    meta = mpisyncbn.SyncBatchNorm(3, device="meta")
    y = meta(torch.zeros(2, 3, 4, device="meta"))
    with FakeTensorMode():
        fake = mpisyncbn.SyncBatchNorm(3)(torch.zeros(2, 3, 4))
    assert y.is_meta
    assert y.shape == fake.shape == (2, 3, 4)
    assert resolve(None).exchanges == before
