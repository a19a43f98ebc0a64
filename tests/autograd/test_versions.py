"""If torch is too old to compile a layer, an error says so, and names a way that works."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mpisyncbn
from mpisyncbn import MPISyncBNError, torch_versions
from support.oracle import distance, shard
from support.ranks import WORLD, error_of, no_exchange, up_to_two
from support.versions import compiler_tests

pytestmark = [up_to_two, *compiler_tests]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), mpisyncbn.SyncBatchNorm(4), nn.ReLU()).double()


@no_exchange
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiler_that_is_too_old(fullgraph, monkeypatch):
    """Compiling raises an error in training, not evaluation. Every torch counts as too old."""
    monkeypatch.setattr(torch_versions, "COMPILES", False)
    layers, x = net(), shard((3, 3), 1, dtype=torch.float64)
    compiled = torch.compile(layers, fullgraph=fullgraph, backend="aot_eager")
    error = error_of(lambda: compiled(x), MPISyncBNError)
    y = torch.compile(layers.eval(), fullgraph=fullgraph, backend="aot_eager")(x)
    expected = layers(x)
    assert "expected torch 2.11 or newer" in str(error)
    assert layers[1].num_batches_tracked == 0
    assert torch.equal(y, expected)


def test_layers_outside_of_the_graph(monkeypatch):
    """Layers work outside of the graph, which is the way around that the error names."""
    monkeypatch.setattr(torch_versions, "COMPILES", False)
    outside = torch.compiler.disable(mpisyncbn.SyncBatchNorm.forward)
    monkeypatch.setattr(mpisyncbn.SyncBatchNorm, "forward", outside)
    eager, x = net(), shard((3 + WORLD.rank, 3), 1, dtype=torch.float64)
    layers = copy.deepcopy(eager)
    compiled = torch.compile(layers, backend="aot_eager")
    for step in range(2):
        for each in (eager, compiled):
            each(x + step).pow(3).sum().backward()
    for a, b in zip(layers.parameters(), eager.parameters(), strict=True):
        assert distance(a.grad, b.grad) < 1e-12
    assert layers[1].num_batches_tracked == 2
