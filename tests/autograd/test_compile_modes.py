"""torch.compile gives the eager results in all its modes, and together with other tools."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo import config
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import mpisyncbn
from support.oracle import distance, shard
from support.ranks import WORLD, up_to_two
from support.versions import compiler_tests, compiles

BACKEND = "aot_eager"
pytestmark = [up_to_two, compiles, *compiler_tests]
slow = pytest.mark.full("torch's compiler takes its time")
to_machine_code = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor compiles C++, and there is no g++"
)


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 4))
    return mpisyncbn.convert_sync_batchnorm(net)


def train(net, forward, sizes=(3, 3)):
    """Train a step for each size, one more on rank 1. Return the parameters and buffers."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    step = optimizer.step if forward is net else torch.compile(optimizer.step, backend=BACKEND)
    for size in sizes:
        optimizer.zero_grad()
        forward(shard((size + WORLD.rank, 2), size)).square().mean().backward()
        step()
    return [*net.parameters(), *net.buffers()]


def same(got, expected) -> bool:
    return all(
        distance(a.detach(), b.detach(), torch.ones(1)) < 1e-5 for a, b in zip(got, expected, strict=True)
    )


@slow
@to_machine_code
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(mode):
    eager, net = model(), model()
    assert same(train(net, torch.compile(net, fullgraph=True, mode=mode)), train(eager, eager))


@slow
def test_shapes_that_change_are_compiled_a_few_times():
    """Eight batch sizes need at most four graphs."""
    eager, net = model(), model()
    backend = CompileCounterWithBackend(BACKEND)
    sizes = (3, 4, 6, 5, 9, 7, 8, 2)
    assert same(
        train(net, torch.compile(net, fullgraph=True, backend=backend), sizes), train(eager, eager, sizes)
    )
    assert backend.frame_count <= 4


def test_compiled_autograd_is_refused():
    layer, x = mpisyncbn.SyncBatchNorm(3), shard((3 + WORLD.rank, 3), 1).requires_grad_()
    with (
        config.patch(compiled_autograd=True),
        pytest.raises(Exception, match="compiled autograd cannot run the backward pass of a synchronized"),
    ):
        torch.compile(layer, backend=BACKEND)(x)
    assert layer.num_batches_tracked == 0
    layer(x).sum().backward()  # the eager layer still works


@slow
@to_machine_code
def test_caches_of_compiled_graphs():
    """A compiler that has forgotten all but its files finds graphs there, as another process."""
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        net = model()
        results.append(train(net, torch.compile(net, fullgraph=True)))
    assert counters["inductor"]["fxgraph_cache_hit"] > 0
    assert same(*results)


@slow
def test_a_compiled_model_is_saved():
    net = model()
    compiled = torch.compile(net, backend=BACKEND)
    train(net, compiled)
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert same(loaded.state_dict().values(), compiled.state_dict().values())
    assert same(train(loaded, loaded), train(net, compiled))
