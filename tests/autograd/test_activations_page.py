"""docs/activations.md: each cell of its tables is read, and tried."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from mpisyncbn import SyncBatchNorm, sync_batch_norm
from mpisyncbn.activations import activation_of
from mpisyncbn.kernels import ActivationContext, aten, generic
from support.activations import ACTIVATIONS, TORCHS, far_from_kinks
from support.dlpack import LikeCuPy, dlpack_kernels
from support.jobs import ROOT
from support.kernels import EVERY, check_fused, cpu, needs_native
from support.oracle import distance, shard
from support.ranks import no_exchange
from support.versions import compiles

pytestmark = no_exchange
PAGE = (ROOT / "docs" / "activations.md").read_text()
SHAPE = (4, 3, 5)


def table(heading: str) -> dict[str | None, dict[str, str]]:
    """The rows of the table below a heading, by the first cell of each; None for the row "none"."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    first, _, *rest = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    columns = first.split(" | ")[1:]
    rows = [line.replace("`", "").split(" | ") for line in rest]
    return {None if name == "none" else name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}


KEPT, WORKS, KERNELS = table("What a layer keeps"), table("What works"), table("On which kernels")
LATER = ("mask", "memory_efficient")  # masks, memory_efficient: rows and columns without a test


def cells(rows: dict[str | None, dict[str, str]], *columns: str) -> list[Any]:
    return [
        pytest.param(name, column, rows[name][column], id=f"{name}-{column}")
        for name in rows
        if name not in LATER
        for column in columns or rows[name]
        if column not in LATER
    ]


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, residual, dy and a direction."""
    return [shard(SHAPE, seed, dtype=dtype) for seed in range(1, 5)]


def layer_of(activation: str | None, dtype: torch.dtype | None = None) -> SyncBatchNorm:
    layer = SyncBatchNorm(SHAPE[1], activation=activation, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -0.7, 2.0]))
        layer.bias.copy_(torch.tensor([0.3, 0.0, -0.4]))
    return layer


def test_the_tables_have_a_row_for_each_activation():
    kinds = {activation_of(each).kind for each in (None, *ACTIVATIONS)}
    for rows in (KEPT, WORKS, {None: {}, **KERNELS}):
        assert {activation_of(each).kind for each in rows if each not in LATER} == kinds
        assert set(LATER) <= set(rows)


@pytest.mark.parametrize(("activation", "column", "cell"), cells(KEPT, "kept", "kept with a residual"))
def test_what_is_kept(activation, column, cell):
    layer, (x, residual, *_) = layer_of(activation, torch.float64), tensors()
    x.requires_grad_(), residual.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t
    ):
        y = layer(x, residual if "residual" in column else None)
    names = {x.data_ptr(): "x", residual.data_ptr(): "residual", y.data_ptr(): "y"}
    large = [each for each in kept if each.data_ptr() not in (layer.weight.data_ptr(), layer.bias.data_ptr())]
    assert ", ".join(names[each.data_ptr()] for each in large) == cell
    assert {each.nbytes for each in large} == {x.nbytes}


@needs_native
@pytest.mark.parametrize(
    ("activation", "column", "cell"), cells(KEPT, "computed again", "computed again with a residual")
)
def test_what_is_computed_again(activation, column, cell):
    """A pass that computes the activation's input again finds another one if the bias is another."""
    (x, residual, dy, _), function = tensors(), activation_of(activation)
    vectors, weight, bias = (np.zeros(3), np.ones(3)), torch.ones(3).double(), torch.zeros(3).double()
    if "residual" not in column:
        residual = None
    y = cpu.normalize(x, *vectors, weight, bias, residual, function)
    saved = (None, None)
    if residual is not None and activation:
        saved = (y, None) if function.sign_decides else (None, residual)
    contexts = [ActivationContext(function, weight, each, *saved) for each in (bias, bias + 99)]
    if not activation:
        contexts = [None, None]
    sums = [cpu.backward_reduce(dy, x, *vectors, context) for context in contexts]
    dz = sums[0][2]
    dxs = [cpu.backward_elementwise(dz, x, *vectors, weight, *vectors, context) for context in contexts]
    times = (not np.array_equal(sums[0][0], sums[1][0])) + (not torch.equal(*dxs))
    assert ["never", "once", "twice"][times] == cell


def one_step(activation, column, dtype=torch.float64, wrap=lambda layer: layer):
    """A fused layer's results, each beside that of its parts in float64."""
    layer = layer_of(activation, dtype)
    plain = copy.deepcopy(layer).double()
    plain.activation = None
    inputs = [each.requires_grad_() for each in tensors(dtype)[: 2 if column == "residual" else 1]]
    wide = [each.detach().double().requires_grad_() for each in inputs]
    z = sum((plain(wide[0]), *wide[1:]))
    y, expected = wrap(layer)(*inputs), TORCHS[activation](z)
    dy = tensors(dtype)[2] * far_from_kinks(z, activation, 1e-4)
    y.backward(dy)
    expected.backward(dy.double())
    leaves = zip((*inputs, *layer.parameters()), (*wide, *plain.parameters()), strict=True)
    return [(y, expected), *((ours.grad, theirs.grad) for ours, theirs in leaves)]


def derivative(activation, column):
    """A derivative of the fused layer and of its parts."""
    x, _, dy, direction = tensors()
    weight = torch.tensor([1.0, -0.7, 2.0]).double()

    def parts(x):
        return TORCHS[activation](sync_batch_norm(x, None, None, weight))

    results = []
    for function in (lambda x: sync_batch_norm(x, None, None, weight, activation=activation), parts):
        if column == "forward mode":
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, direction)
                results.append(forward_ad.unpack_dual(function(dual)).tangent)
        else:
            leaf = x.clone().requires_grad_()
            (dx,) = torch.autograd.grad(function(leaf), leaf, dy, create_graph=True)
            results.append(torch.autograd.grad((dx * direction).sum(), leaf)[0])
    return [tuple(results)]


TRIED = {
    "residual": one_step,
    "float16, bfloat16": lambda *cell: one_step(*cell, torch.float16) + one_step(*cell, torch.bfloat16),
    "second derivatives": derivative,
    "forward mode": derivative,
}


@pytest.mark.parametrize(("activation", "column", "cell"), cells(WORKS, *TRIED))
def test_what_works(activation, column, cell):
    assert cell == "yes"
    tolerance = 3e-2 if column.startswith("float16") else 1e-10
    for found, expected in TRIED[column](activation, column):
        assert distance(found, expected) < tolerance


@compiles
@pytest.mark.full("torch's compiler takes its time")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize(("activation", "column", "cell"), cells(WORKS, "torch.compile"))
def test_what_is_compiled(activation, column, cell):
    assert cell == "yes"

    def compiled(layer):
        return torch.compile(layer, fullgraph=True, backend="aot_eager")

    for found, expected in one_step(activation, column, wrap=compiled):
        assert distance(found, expected) < 1e-10


def test_columns_that_no_test_reads():
    """masks, memory_efficient: to be tried like the others."""
    assert set(WORKS[None]) == {*TRIED, "torch.compile", *LATER}
    assert set(KEPT[None]) == {
        "kept",
        "kept with a residual",
        "computed again",
        "computed again with a residual",
    }


MODULES = {each.id: each for each in EVERY}


@pytest.mark.parametrize(
    ("activation", "cell", "kernels"),
    [
        pytest.param(
            name, row[module], *MODULES[module].values, id=f"{name}-{module}", marks=MODULES[module].marks
        )
        for name, row in KERNELS.items()
        if name not in LATER
        for module in row
        if module != "dlpack"
    ],
)
def test_kernels(activation, cell, kernels):
    x, residual, dy, _ = tensors(torch.float32)
    vectors = [torch.tensor([1.0, -0.7, 2.0]), torch.tensor([0.3, 0.0, -0.4])]
    libraries = {"torch": lambda tensor: tensor}
    if kernels in (cpu, aten, generic):  # the others are called by way of a copy to a device
        libraries["NumPy"] = lambda tensor: tensor.numpy()
    for library, convert in libraries.items():
        arrays = [convert(each) for each in (x, dy, *vectors)]
        if library in cell:
            check_fused(kernels, *arrays, None, activation=activation)
            check_fused(kernels, *arrays, convert(residual), activation=activation)
        else:
            with pytest.raises((AttributeError, TypeError)):
                kernels.normalize(arrays[0], *np.ones((2, 3)), None, None, None, activation_of(activation))
    assert set(cell.split(", ")) <= set(libraries)


@pytest.mark.untraced
@pytest.mark.parametrize(("activation", "column", "cell"), cells(KERNELS, "dlpack"))
def test_kernels_for_cupy(activation, column, cell, monkeypatch):
    assert cell == "CuPy"
    x, residual, dy, _ = (each.numpy().view(LikeCuPy) for each in tensors(torch.float32))
    vectors = [np.array([1.0, -0.7, 2.0], "f4"), np.array([0.3, 0.0, -0.4], "f4")]
    with dlpack_kernels(monkeypatch) as (kernels, _):
        check_fused(kernels, x, dy, *vectors, None, activation=activation)
        check_fused(kernels, x, dy, *vectors, residual, activation=activation)
