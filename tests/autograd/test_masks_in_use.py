"""Masks in every use of a layer: evaluation, graphs, compilers, checkpoints, conversion, join."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mpisyncbn
from mpisyncbn import SyncBatchNorm, kernels, update_bn
from mpisyncbn.comm.groups import resolve
from support.masks import ACTIVATIONS, RANK, SIZE, data, is_0_elsewhere, rows
from support.oracle import distance, oracle
from support.ranks import WORLD, no_exchange, together, up_to_two
from support.versions import compiles


@no_exchange
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_evaluation(activation, tracked):
    x, residual, dy, mask = data((4, 6))
    layer = SyncBatchNorm(4, activation=activation, track_running_stats=tracked, dtype=torch.float64)
    with torch.no_grad():
        for each in (layer.weight, layer.bias, *([layer.running_mean, layer.running_var] if tracked else [])):
            each.copy_(torch.linspace(0.5, 2, 4))
    plain = copy.deepcopy(layer).eval()
    leaves = [x.requires_grad_(), residual.requires_grad_(), *layer.parameters()]
    others = [*(rows(v.detach(), mask).requires_grad_() for v in (x, residual)), *plain.parameters()]
    y, expected = layer.eval()(x, residual, mask=mask), plain(*others[:2])
    ours = torch.autograd.grad(y, leaves, dy)
    theirs = torch.autograd.grad(expected, others, rows(dy, mask))
    assert is_0_elsewhere(y, mask)
    assert distance(rows(y, mask), expected) < 1e-12
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert is_0_elsewhere(a, mask)
        assert distance(rows(a, mask), b) < 1e-11
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        assert distance(a, b) < 1e-11


class Masked(nn.Module):
    """A model whose second input is a mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = SyncBatchNorm(4, **options)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(x, mask=mask) * 1


@no_exchange
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("tracked", [True, False])
def test_graphs_of_evaluation(tracked):
    x, _, _, mask = data((4, 6), torch.float32)
    model = Masked(track_running_stats=tracked).eval()
    with torch.no_grad():
        expected = model(x, mask)
        graphs = [torch.jit.trace(model, (x, mask)), torch.fx.symbolic_trace(model)]
        graphs.append(torch.export.export(model, (x, mask)).module())
        for graph in graphs:
            assert torch.equal(graph(x, mask), expected)
    assert is_0_elsewhere(expected, mask)
    assert rows(expected, mask).isfinite().all()


@up_to_two
@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("activation", [None, "silu"])
def test_compiled(activation):
    eager = SyncBatchNorm(5, activation=activation)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual, dy, mask = data((5, 6), torch.float32)
    found = []
    for each, module in ((compiled, layer), (eager, eager)):
        for training in (True, False):
            each.train(training)
            leaves = [v.clone().requires_grad_() for v in (x, residual)]
            y = each(*leaves, mask=mask)
            y.backward(dy)
            gradients = [p.grad.clone() for p in module.parameters()]
            found.append([y, *(v.grad for v in leaves), *gradients, *module.buffers()])
    with together():
        for a, b in zip(found[0] + found[1], found[2] + found[3], strict=True):
            assert a.isfinite().all()
            assert distance(a, b) < 1e-5
        assert is_0_elsewhere(found[0][0], mask)
        assert is_0_elsewhere(found[0][1], mask)


def test_momentum_checkpoints_and_shapes_without_data():
    layer = SyncBatchNorm(4, momentum=None, dtype=torch.float64)
    means = []
    for seed in range(2):
        x, _, _, mask = data((4, 6))
        x = (x * (seed + 1)).requires_grad_()
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, mask=mask)
        y.sum().backward()
        means.append(oracle(rows(x, mask), rows(x, mask)).mean)
    before = resolve(None).exchanges
    meta = SyncBatchNorm(3, device="meta")(
        torch.zeros(2, 3, 4, device="meta"), mask=torch.ones(2, 1, 4, dtype=torch.bool, device="meta")
    )
    with together():
        assert resolve(None).exchanges == before
        assert meta.shape == (2, 3, 4)
        assert layer.num_batches_tracked == 2
        assert distance(layer.running_mean, sum(means) / 2) < 1e-12


class Batch(nn.Module):
    """A model that makes its own mask: it is true where the first channel is not NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        mask = ~x[:, :1].isnan()
        return self.norm(x, mask=mask) if isinstance(self.norm, SyncBatchNorm) else self.norm(rows(x, mask))


def test_update_bn():
    model = mpisyncbn.convert_sync_batchnorm(Batch().double())
    batches = [data((4, 6))[0] * (step + 1) for step in range(RANK + 1)]
    update_bn(iter(batches), model)
    true = [rows(x, ~x[:, :1].isnan()) for x in batches]
    whole = torch.cat(WORLD.allgather(torch.cat(true)))
    with together():
        assert distance(model.norm.running_mean, whole.mean(0)) < 1e-12
        assert distance(model.norm.running_var, whole.var(0)) < 1e-12


def test_join_and_data_parallel(world):
    """Each rank has RANK + 1 batches. Ranks that have finished theirs answer the others."""
    ddp = DistributedDataParallel(mpisyncbn.convert_sync_batchnorm(Batch().double()))
    with mpisyncbn.distributed.join(ddp):
        for step in range(RANK + 1):
            y = ddp(data((4, 6))[0] * (step + 1))
            y.square().sum().backward()
    x, _, _, mask = data((4, 6))
    true = WORLD.allgather(rows(x, mask))
    running = torch.zeros(4, dtype=torch.float64)
    for step in range(SIZE):
        whole = torch.cat(true[step:])
        if len(whole):
            running = 0.9 * running + 0.1 * whole.mean(0) * (step + 1)
    with together():
        assert ddp.module.norm.weight.grad.isfinite().all()
        assert distance(ddp.module.norm.running_mean, running) < 1e-12


class Doubled(nn.BatchNorm1d):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * 2


class Halved(SyncBatchNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(input, residual, mask=mask) / 2


def test_registered_forwards_and_classes_of_ones_own():
    @mpisyncbn.register_conversion(Doubled)
    def forward(layer, batch_norm, x, mask):
        return batch_norm(x, None, "relu", mask) * 2

    x, _, _, mask = data((4, 6))
    found = []
    for cls, factor in ((SyncBatchNorm, 2), (Halved, 1)):
        model = cls.convert_sync_batchnorm(Doubled(4).double())
        found.append((model(x, mask), factor))
    expected = F.relu(SyncBatchNorm(4, dtype=torch.float64)(x, mask=mask))
    lazy = mpisyncbn.convert_sync_batchnorm(nn.LazyBatchNorm1d(dtype=torch.float64))
    y = lazy(x, mask=mask)
    with together():
        for ours, factor in found:
            assert distance(ours, expected * factor) < 1e-12
        assert distance(F.relu(y), expected) < 1e-12


@pytest.mark.parametrize("activation", [None, "leaky_relu(0.1)"])
@pytest.mark.parametrize("native", [True, False])
def test_memory_efficient(activation, native, monkeypatch):
    """The output is kept in place of the input, or beside it where it does not determine it."""
    if not native:
        monkeypatch.setattr(kernels, "native", lambda: None)
    x, _, dy, mask = data((4, 6))
    found, efficient = [], SyncBatchNorm(4, activation=activation, memory_efficient=True, dtype=torch.float64)
    with torch.no_grad():
        efficient.weight.copy_(torch.tensor([1.0, -0.5, 1e-9, 2.0]))
        efficient.bias.copy_(torch.tensor([0.5, 0.1, 3.0, 0.0]))
    plain = copy.deepcopy(efficient)
    plain.memory_efficient = False
    for layer in (efficient, plain):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, mask=mask)
        y.backward(dy)
        found.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    with together():
        for a, b in zip(*found, strict=True):
            assert distance(a, b) < 1e-10
        assert is_0_elsewhere(found[0][1], mask)
