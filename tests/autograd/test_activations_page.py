"""Each cell of the tables in docs/guides/activations.md, but for masks, is read and tried."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from mpisyncbn import MPISyncBNError, SyncBatchNorm, sync_batch_norm, torch_versions
from mpisyncbn.activations import activation_of
from mpisyncbn.kernels import ActivationContext, aten, generic
from mpisyncbn.kernels.activation import UndoneContext
from support.activations import ACTIVATIONS, TORCHS, far_from_kinks
from support.device import needs_triton
from support.dlpack import LikeCuPy, dlpack_kernels
from support.jobs import ROOT
from support.kernels import EVERY, check_fused, cpu, needs_native
from support.oracle import distance, shard
from support.ranks import no_exchange
from support.versions import compiles

pytestmark = no_exchange
PAGE = (ROOT / "docs" / "guides" / "activations.md").read_text()
SHAPE = (4, 3, 5)


def table(heading: str) -> dict[str | None, dict[str, str]]:
    """Return the rows of the table below a heading, by their first cells.

    The first cell "none" becomes None. A row is a dict of its other cells by column.
    """
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    first, _, *rest = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    columns = first.split(" | ")[1:]
    rows = [line.replace("`", "").split(" | ") for line in rest]
    return {None if name == "none" else name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}


KEPT, WORKS, KERNELS = table("What a layer keeps"), table("What works"), table("On which kernels")
NO_ACTIVATIONS = ("mask", "memory_efficient")  # test_masks_page.py reads the cells on masks


def cells(rows: dict[str | None, dict[str, str]], *columns: str) -> list[Any]:
    return [
        pytest.param(name, column, rows[name][column], id=f"{name}-{column}")
        for name in rows
        if name not in NO_ACTIVATIONS
        for column in columns or rows[name]
        if column not in NO_ACTIVATIONS
    ]


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return x, residual, dy and a direction for directional derivatives."""
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
        assert {activation_of(each).kind for each in rows if each not in NO_ACTIVATIONS} == kinds
        assert set(NO_ACTIVATIONS) <= set(rows)


def kept_by(layer: SyncBatchNorm, x: Tensor, residual: Tensor | None = None) -> str:
    """Return the names of the tensors of the input's size that autograd keeps."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.detach()), tensor.detach())[1], lambda t: t
    ):
        y = layer(x, residual)
    names = {x.data_ptr(): "x", y.data_ptr(): "y"}
    if residual is not None:
        names[residual.data_ptr()] = "residual"
    large = [each for each in kept if each.data_ptr() not in (layer.weight.data_ptr(), layer.bias.data_ptr())]
    assert {each.nbytes for each in large} == {x.nbytes}
    return ", ".join(names[each.data_ptr()] for each in large)


@pytest.mark.parametrize(("activation", "column", "cell"), cells(KEPT, "kept", "kept with a residual"))
def test_tensors_kept_for_the_backward_pass(activation, column, cell):
    layer, (x, residual, *_) = layer_of(activation, torch.float64), tensors()
    x.requires_grad_(), residual.requires_grad_()
    assert kept_by(layer, x, residual if "residual" in column else None) == cell


@needs_native
@pytest.mark.parametrize(
    ("activation", "column", "cell"), cells(KEPT, "computed again", "computed again with a residual")
)
def test_passes_that_compute_the_input_again(activation, column, cell):
    """The page says how many passes over memory compute the activation's input again.

    The result of such a pass changes with the bias.
    """
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
    """Return pairs: a result of the fused layer, and that of separate operations in float64."""
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
    """Return a list of one pair: a derivative of the fused layer, and of separate operations."""
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
def test_features_that_work(activation, column, cell):
    assert cell == "yes"
    tolerance = 3e-2 if column.startswith("float16") else 1e-10
    for found, expected in TRIED[column](activation, column):
        assert distance(found, expected) < tolerance


@compiles
@pytest.mark.full("torch's compiler takes its time")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize(("activation", "column", "cell"), cells(WORKS, "torch.compile"))
def test_compiled_activations(activation, column, cell):
    assert cell == "yes"

    def compiled(layer):
        return torch.compile(layer, fullgraph=True, backend="aot_eager")

    for found, expected in one_step(activation, column, wrap=compiled):
        assert distance(found, expected) < 1e-10


def memory_efficient_layer(dtype: torch.dtype = torch.float64) -> SyncBatchNorm:
    layer = layer_of("leaky_relu", dtype)
    layer.memory_efficient = True
    return layer


@pytest.mark.parametrize("activation", [name for name in WORKS if name not in NO_ACTIVATIONS])
def test_activations_that_may_be_memory_efficient(activation):
    cell, layer, (x, *_) = WORKS[activation]["memory_efficient"], layer_of(activation), tensors(torch.float32)
    if cell == "no":
        with pytest.raises(ValueError, match="memory_efficient"):
            layer.memory_efficient = True
    else:
        layer.memory_efficient = True
        assert (kept_by(layer, x.requires_grad_()), cell) == ("y", "yes")


def test_tensors_kept_by_a_memory_efficient_layer():
    row, layer, (x, residual, *_) = KEPT["memory_efficient"], memory_efficient_layer(), tensors()
    assert kept_by(layer, x.requires_grad_()) == row["kept"]
    with pytest.raises(ValueError, match="no residual"):
        layer(x, residual)
    assert row["kept with a residual"] == row["computed again with a residual"] == "refused"


@needs_native
def test_a_memory_efficient_layer_computes_the_input_again():
    """Both passes compute the activation's input from the output: the context has no bias."""
    y, _, dy, _ = tensors()
    vectors, weight, bias = (np.zeros(3), np.ones(3)), torch.ones(3).double(), torch.zeros(3).double()
    function = activation_of("leaky_relu")
    contexts = [UndoneContext(function, weight, each) for each in (bias, bias + 99)]
    sums = [cpu.backward_reduce(dy, y, *vectors, context) for context in contexts]
    dxs = [cpu.backward_elementwise(dy, y, *vectors, weight, *vectors, context) for context in contexts]
    assert np.array_equal(sums[0][:2], sums[1][:2])
    assert torch.equal(*dxs)
    assert KEPT["memory_efficient"]["computed again"] == "from y"


@pytest.mark.parametrize("column", [*TRIED, "torch.compile"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
def test_features_that_work_with_memory_efficient(column):
    cell, (x, residual, dy, direction) = WORKS["memory_efficient"][column], tensors()
    layer = memory_efficient_layer()
    x.requires_grad_()
    if column == "residual":
        with pytest.raises(ValueError, match="no residual"):
            layer(x, residual)
        found = "no"
    elif column == "second derivatives":
        with pytest.raises(MPISyncBNError, match="memory_efficient"):
            torch.autograd.grad(layer(x), x, dy, create_graph=True)
        found = "no"
    elif column == "forward mode":
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x, direction))
        found = "keeps x" if y.grad_fn.kept_channels is None else "keeps y"
    elif column == "torch.compile":
        if not torch_versions.COMPILES:
            pytest.skip("this torch cannot compile it")
        found = "keeps " + kept_by_graph(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    else:
        halves = (torch.float16, torch.bfloat16)
        each = [
            kept_by(memory_efficient_layer(torch.float32), x.detach().to(h).requires_grad_()) for h in halves
        ]
        assert each[0] == each[1]
        found = f"keeps {each[0]}"
    assert found == cell


def kept_by_graph(compiled: Any, x: Tensor) -> str:
    """Return the names of those of x and y that a compiled graph keeps."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.data_ptr()), tensor.detach())[1], lambda t: t
    ):
        y = compiled(x)
    return ", ".join(name for name, tensor in (("x", x), ("y", y)) if tensor.data_ptr() in kept)


def test_on_which_kernels_memory_efficient_works():
    """The page lists the modules that keep y, and those that keep x.

    tests/kernels/test_from_output.py tries the former. In tests/gpu/test_cuda.py, a layer on a
    device keeps x.
    """
    row = KERNELS["memory_efficient"]
    assert {module for module in row if row[module] == "torch"} == {"cpu", "aten", "generic"}
    assert {module for module in row if row[module] == "keeps x"} == {"cuda", "aten_cuda", "dlpack"}


def test_columns():
    assert set(WORKS[None]) == {*TRIED, "torch.compile", *NO_ACTIVATIONS}
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
        if name not in NO_ACTIVATIONS
        for module in row
        if module != "dlpack"
    ],
)
def test_kernels(activation, cell, kernels):
    x, residual, dy, _ = tensors(torch.float32)
    vectors = [torch.tensor([1.0, -0.7, 2.0]), torch.tensor([0.3, 0.0, -0.4])]
    libraries = {"torch": lambda tensor: tensor}
    if kernels in (cpu, aten, generic):  # the others copy tensors to a device
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


@needs_triton
@pytest.mark.untraced
@pytest.mark.parametrize(("activation", "column", "cell"), cells(KERNELS, "dlpack"))
def test_kernels_for_cupy(activation, column, cell, monkeypatch):
    assert cell == "CuPy"
    x, residual, dy, _ = (each.numpy().view(LikeCuPy) for each in tensors(torch.float32))
    vectors = [np.array([1.0, -0.7, 2.0], "f4"), np.array([0.3, 0.0, -0.4], "f4")]
    with dlpack_kernels(monkeypatch) as (kernels, _):
        check_fused(kernels, x, dy, *vectors, None, activation=activation)
        check_fused(kernels, x, dy, *vectors, residual, activation=activation)
