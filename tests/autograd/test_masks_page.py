"""The cells on masks of the tables in docs/guides/activations.md are read and tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from mpisyncbn import SyncBatchNorm, kernels, sync_batch_norm
from mpisyncbn.kernels import Array, kernels_for, masked
from support.masks import data, is_0_elsewhere, rows
from support.oracle import distance
from support.ranks import no_exchange, together, up_to_two
from support.versions import compiles

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "activations.md").read_text()


def row(name: str, heading: str) -> dict[str, str]:
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    columns, *lines = (line.split(" | ") for line in re.findall(r"^\| (.*) \|$", section, re.MULTILINE))
    (cells,) = (line for line in lines if line[0].strip("`") == name)
    return dict(zip(columns[1:], cells[1:], strict=True))


ACTIVATIONS = [
    *("none", "relu", "leaky_relu", "leaky_relu(-0.2)", "silu", "hardswish", "elu", "gelu", "gelu(tanh)")
]


def kept_by(layer: SyncBatchNorm, mask: Tensor, x: Tensor, residual: Tensor | None) -> set[str]:
    """Return the names of the tensors that autograd keeps, besides weight and bias."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.detach()), tensor.detach())[1], lambda tensor: tensor
    ):
        y = layer(x, residual, mask=mask)
    names = {"x": x, "y": y, "mask": mask, "weight": layer.weight, "bias": layer.bias}
    by_address = {tensor.data_ptr(): name for name, tensor in names.items()}
    if residual is not None:
        by_address[residual.data_ptr()] = "residual"
    return {by_address[each.data_ptr()] for each in kept} - {"weight", "bias"}


@up_to_two
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tensors_kept_for_the_backward_pass(activation):
    layer = SyncBatchNorm(4, activation=None if activation == "none" else activation, dtype=torch.float64)
    x, residual, _, mask = data((4, 6))
    own, masks = row(activation, "What a layer keeps"), row("mask", "What a layer keeps")
    x.requires_grad_(), residual.requires_grad_()
    found = [kept_by(layer, mask, x, each) for each in (None, residual)]
    with together():
        assert found[0] == set(own["kept"].split(", ")) | {"mask"} == set(masks["kept"].split(", "))
        assert found[1] == set(own["kept with a residual"].split(", ")) | {"mask"}
        assert masks["kept with a residual"] == "the above, mask"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_works_with_a_mask(activation):
    assert row(activation, "What works")["mask"] == "yes"
    name = None if activation == "none" else activation
    x, residual, dy, mask = data((4, 6))
    found = []
    for tensors, of_mask in (((x, residual, dy), mask), ([rows(v, mask) for v in (x, residual, dy)], None)):
        leaves = [v.clone().requires_grad_() for v in tensors[:2]]
        for more in (None, leaves[1]):
            y = sync_batch_norm(leaves[0], None, None, activation=name, residual=more, mask=of_mask)
            asked = leaves if more is not None else leaves[:1]
            found.append([y, *torch.autograd.grad(y, asked, tensors[2])])
    with together():
        for ours, theirs in zip(found[:2], found[2:], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert is_0_elsewhere(a, mask)
                assert distance(rows(a, mask), b) < 1e-10


def derivatives(column: str, x: Tensor, dy: Tensor, mask: Tensor | None) -> list[Tensor]:
    def layer(x: Tensor, residual: Tensor | None = None) -> Tensor:
        options = {"activation": "leaky_relu", "residual": residual, "mask": mask}
        return sync_batch_norm(x, None, None, memory_efficient=column == "memory_efficient", **options)

    leaf = x.clone().requires_grad_()
    if column == "second derivatives":
        (first,) = torch.autograd.grad(layer(leaf), leaf, dy, create_graph=True)
        return [first, *torch.autograd.grad(first.pow(3).sum(), leaf)]
    if column == "forward mode":
        with forward_ad.dual_level():
            return [forward_ad.unpack_dual(layer(forward_ad.make_dual(x, dy))).tangent]
    y = layer(leaf, leaf) if column == "residual" else layer(leaf)
    return [y, *torch.autograd.grad(y, leaf, dy)]


@pytest.mark.parametrize(
    "column", ["residual", "float16, bfloat16", "second derivatives", "forward mode", "memory_efficient"]
)
def test_features_that_work_with_a_mask(column):
    assert row("mask", "What works")[column] == "yes"
    found = []
    for dtype in (torch.float16, torch.bfloat16) if column.startswith("float16") else (torch.float64,):
        x, _, dy, mask = data((4, 6), dtype)
        wide = [rows(v, mask).double() for v in (x, dy)]
        ours = derivatives(column, x, dy, mask)
        found += [(a, b, mask) for a, b in zip(ours, derivatives(column, *wide, None), strict=True)]
    with together():
        for a, b, mask in found:
            assert is_0_elsewhere(a, mask)
            assert distance(rows(a, mask), b) < (3e-2 if column.startswith("float16") else 1e-10)


@compiles
def test_compiled():
    """tests/autograd/test_masks_in_use.py compiles a layer with a mask."""
    assert row("mask", "What works")["torch.compile"] == "yes"
    assert row("memory_efficient", "What works")["mask"] == "yes"


@no_exchange
def test_on_which_kernels(monkeypatch):
    """tests/kernels/test_cupy.py tries masks with CuPy."""
    assert row("mask", "On which kernels") == {
        "cpu": "torch, NumPy",
        **dict.fromkeys(("aten", "cuda", "aten_cuda", "dlpack"), "by generic"),
        "generic": "torch, NumPy, CuPy",
    }
    x, _, _, mask = data((4, 6))

    def module_of(x: Array, mask: Array) -> object:
        return kernels_for(x, mask).local_moments.func.__module__

    native = kernels.native()
    for array, of_array in ((x, mask), (x.numpy(), mask.numpy())):
        assert module_of(array, of_array) == (native or masked).__name__
    monkeypatch.setattr(kernels, "native", lambda: None)
    for array, of_array in ((x, mask), (x.numpy(), mask.numpy())):
        assert module_of(array, of_array) == masked.__name__
