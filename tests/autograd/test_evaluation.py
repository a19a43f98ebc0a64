"""Gradients of evaluation use the running statistics of the forward, even if these change."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mpisyncbn
from support.activations import TORCHS
from support.oracle import distance, local_batch, shard


def evaluated(layer, x, residual=None):
    """Return the gradient of sum(y**3) by x in float64, in evaluation with these statistics."""
    x = x.detach().double().requires_grad_()
    vectors = [None if v is None else v.detach().double().clone() for v in layer_vectors(layer)]
    y = nn.functional.batch_norm(x, *vectors)
    y = y if residual is None else y + residual.double()
    return torch.autograd.grad(TORCHS[layer.activation](y).pow(3).sum(), x)[0]


def layer_vectors(layer):
    return layer.running_mean, layer.running_var, layer.weight, layer.bias


def by_function(layer, x, residual=None):
    options = {"activation": layer.activation, "residual": residual, "training": layer.training}
    return mpisyncbn.sync_batch_norm(x, *layer_vectors(layer), momentum=0.1, **options)


@pytest.mark.parametrize("order", ["et", "ete", "te"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"activation": "relu", "residual": True},
        {"activation": "silu"},
        {"dtype": torch.float64},
        {"half": torch.bfloat16},
        {"frozen": True},
        {"function": True},
    ],
    ids=str,
)
def test_evaluation_and_training_before_one_backward(order, options):
    """Each gradient uses the statistics of its forward pass. torch's layers use the last ones."""
    options = dict(options)
    half, frozen, residual, function = (
        options.pop(name, None) for name in ("half", "frozen", "residual", "function")
    )
    layer = mpisyncbn.SyncBatchNorm(3, **options).requires_grad_(not frozen)
    forward = partial(by_function, layer) if function else layer
    dtype = half or options.get("dtype", torch.float32)
    loss, inputs, expected = 0, [], []
    for step, mode in enumerate(order):
        x = shard((local_batch(3), 3, 4), step, 1.0, dtype).requires_grad_()
        more = shard(tuple(x.shape), 9, dtype=dtype) if residual else None
        if mode == "e":
            inputs.append(x)
            expected.append(evaluated(layer.eval(), x, more))
        layer.train(mode == "t")
        loss = loss + forward(x, more).double().pow(3).sum()
    loss.backward()
    tolerance = 3e-2 if half else 1e-5
    for x, dx in zip(inputs, expected, strict=True):
        assert distance(x.grad, dx) < tolerance


def test_statistics_that_change_between_evaluation_and_backward():
    """Gradients are right if statistics change after the forward, or are of inference mode.

    Loading a checkpoint changes statistics in place, as DDP's broadcast of buffers does.
    """
    layer, x = mpisyncbn.SyncBatchNorm(3, affine=False).eval(), shard((4, 3), 1).requires_grad_()
    expected, y = evaluated(layer, x), layer(x)
    layer.load_state_dict({**layer.state_dict(), "running_var": torch.full((3,), 4.0)})
    with torch.inference_mode():
        layer.running_mean, layer.running_var = torch.zeros(3), torch.full((3,), 9.0)
    expected += evaluated(layer, x)
    (y.pow(3).sum() + layer(x).pow(3).sum()).backward()
    assert distance(x.grad, expected) < 1e-5


def test_tensors_without_values_are_evaluated_without_a_warning():
    torch.set_warn_always(True)  # not only the first time in a process
    try:
        with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = mpisyncbn.SyncBatchNorm(3).eval()(torch.zeros(2, 3, 4))
    finally:
        torch.set_warn_always(False)
    assert y.shape == (2, 3, 4)
    assert [str(each.message) for each in caught] == []


def test_an_evaluated_graph_that_is_handed_on_holds_torchs_operations_alone():
    net, x = nn.Sequential(mpisyncbn.SyncBatchNorm(3)).eval(), torch.ones(2, 3)
    program, traced = torch.export.export(net, (x,)), torch.jit.trace(net, x)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.batch_norm.default"]
    assert "clone" not in str(traced.inlined_graph)
