"""Point 3 of scripts/gpu_check: layers against the whole batch in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mpisyncbn
from mpisyncbn import functional
from support.activations import TORCHS
from support.whole_batch import distance, whole_batch

from .context import Context
from .reference import BARS, channels_last, random

_ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)
_SOME = (torch.float32, torch.bfloat16)
_BOTH = ("contiguous", "channels_last")
# All activations, tried in float32 and bfloat16. An output is positive only if its input is.
_ACTIVATIONS = ("relu", "leaky_relu(0.1)", "silu", "hardswish", "elu(0.5)", "gelu", "gelu(tanh)")
_IMAGE = (12, 9, 7)  # channels, height, width
_VARIANCE = {torch.float64: 1e-11}  # the largest relative error; 1e-6 for other dtypes
_RUNNING = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]  # (C, *)
    dtypes: tuple[torch.dtype, ...]
    layouts: tuple[str, ...] = _BOTH
    batch: int = 3  # samples on rank 0; each further rank has one more
    mean: float = 0.0
    std: float = 1.0
    affine: bool = True
    mixed: bool = False  # float32 parameters with half-precision input
    dy: str = "like x"
    activation: str | None = None
    residual: bool = False
    masked: bool = False
    quick: bool = False


CASES = [
    Case("image", _IMAGE, _ALL, quick=True),
    Case("volume", (8, 5, 6, 7), _SOME),
    Case("matrix", (33,), _ALL, ("contiguous",), batch=37, quick=True),
    Case("sequence", (20, 31), _SOME),
    Case("no parameters", _IMAGE, (torch.float32, torch.float16), affine=False),
    Case("float32 parameters", _IMAGE, _HALVES, mixed=True),
    Case("empty on rank 0", _IMAGE, _ALL, batch=0, quick=True),
    Case("large mean", (16, 14, 14), (torch.float32, torch.float64), batch=8, mean=1e3, quick=True),
    Case("small variance", (16, 14, 14), (torch.float32, torch.float64), batch=8, std=1e-5),
    Case("constant", _IMAGE, _SOME, mean=3.0, std=0.0),
    Case("dy of the other layout", _IMAGE, _SOME, dy="other"),
    Case("dy with gaps", _IMAGE, _SOME, dy="gaps"),
    Case("dy expanded", _IMAGE, (torch.float32,), dy="expanded"),
    Case("residual", _IMAGE, _SOME, residual=True),
    *(Case(text, _IMAGE, _SOME, activation=text) for text in _ACTIVATIONS),
    *(
        Case(f"residual, {text}", _IMAGE, _SOME, ("contiguous",), activation=text, residual=True)
        for text in _ACTIVATIONS
    ),
    Case("SiLU, all dtypes", _IMAGE, _ALL, ("contiguous",), activation="silu", quick=True),
    Case("residual, ReLU, all dtypes", _IMAGE, _ALL, activation="relu", residual=True, quick=True),
    Case("mask", _IMAGE, _ALL, masked=True, quick=True),
    Case("mask, residual, leaky_relu", _IMAGE, _SOME, activation="leaky_relu", residual=True, masked=True),
    Case("not dense", _IMAGE, _SOME, ("gaps", "offset")),
    Case("many parts", (6, 128, 128), _SOME, batch=24),
    Case("many samples", (3,), (torch.float32,), ("contiguous",), batch=150_000),
    Case("many channels", (1100, 7, 7), _SOME, batch=20),
]


def layers(context: Context, kernels: str) -> None:
    """Check all cases, or some of them with --quick. Collective."""
    try:
        serving = context.served_by(kernels)
    except ImportError as error:
        context.records.skip(kernels, str(error))
        return
    exact = not context.on_gpu or kernels == "cuda"
    with serving:
        for case in CASES:
            for dtype in case.dtypes if case.quick or not context.quick else ():
                for layout in case.layouts if len(case.shape) > 1 else case.layouts[:1]:
                    name = f"{case.name}, {str(dtype).rpartition('.')[2]}, {layout}"
                    with context.records.trying(name):
                        _check(context, case, dtype, layout, name, exact)


def _check(context: Context, case: Case, dtype: torch.dtype, layout: str, name: str, exact: bool) -> None:
    records = context.records
    shape = (case.batch + context.rank, *case.shape)
    seed = 1000 * context.rank + len(name)
    x = laid_out(random(shape, seed, case.mean, case.std).to(dtype), layout)
    dy = _gradient(random(shape, seed + 500, 0.5).to(dtype), x, case.dy)
    residual = laid_out(random(shape, seed + 700).to(dtype), layout) if case.residual else None
    mask = random((shape[0], 1, *shape[2:]), seed + 900) > 0.0 if case.masked else None
    layer, weight, bias = _layer(context, case, torch.float32 if case.mixed else dtype)

    there = context.there(x).requires_grad_()
    residual_there = None if residual is None else context.there(residual).requires_grad_()
    mask_there = None if mask is None else mask.to(context.device)
    y = layer(there, residual_there, mask=mask_there)
    y.backward(context.there(dy))
    _, stats = functional.batch_norm_forward(there.detach(), layer.weight, layer.bias, mask=mask_there)
    context.synchronize()

    found = {"y": y.detach().cpu(), "dx": there.grad.cpu()}
    if mask is not None:
        others = (each[~mask.expand(shape)] for each in found.values())
        outside = max(distance(each, torch.zeros_like(each), 1.0) for each in others)
        records.at_most(f"{name}: y and dx outside of the mask", outside, 0.0)
        found = {what: _rows(each, mask) for what, each in found.items()}
        x, dy, residual = (None if each is None else _rows(each, mask) for each in (x, dy, residual))
    bar = BARS[dtype] * (max(1.0, case.mean) if dtype == torch.float64 else 1.0)
    z = whole_batch(context.world, x, dy, weight, bias, layer.eps).y
    z = z if residual is None else z + residual.double()
    if case.activation:
        # Near zero, rounding decides the sign of the activation's input: take it from y.
        near = z.abs() < 4 * bar * max(1.0, z.abs().max().item())
        z = torch.where(near, torch.where(found["y"] > 0, z.abs(), -z.abs()), z)
    activation, z = TORCHS[case.activation], z.requires_grad_()
    expected_y = activation(z)
    (dz,) = torch.autograd.grad(expected_y, z, dy.double())
    expected = whole_batch(context.world, x, dz, weight, bias, layer.eps)
    errors = {
        "y": (distance(found["y"], expected_y), bar),
        "dx": (distance(found["dx"], expected.dx, expected.dx_scale), bar),
        **_of_vectors(context, case, layer, stats, expected, dtype),
    }
    if residual_there is not None:
        dresidual = residual_there.grad.cpu()
        dresidual = dresidual if mask is None else _rows(dresidual, mask)
        errors["dresidual"] = distance(dresidual, dz), 0.0 if case.activation in (None, "relu") else bar
    for what, (value, most) in errors.items():
        if exact or case.mean < 100 * math.hypot(case.std, layer.eps**0.5):
            records.at_most(f"{name}: {what}", value, most)
        else:  # torch's operations have a float32 mean, with errors of a few roundings
            records.figure(f"{name}: {what}", value)
    records.holds(f"{name}: layout of y and dx", _same_layout(y, there) and _same_layout(there.grad, there))


def _layer(context: Context, case: Case, parameters: torch.dtype) -> tuple[Any, Tensor, Tensor]:
    """A layer on the device, and its weight and bias on the host."""
    channels = case.shape[0]
    layer = mpisyncbn.SyncBatchNorm(
        channels,
        momentum=1.0,
        affine=case.affine,
        activation=case.activation,
        device=context.device,
        dtype=parameters,
    )
    if not case.affine:
        return layer, torch.ones(channels), torch.zeros(channels)
    weight = 0.5 + torch.arange(channels, dtype=torch.float64) % 11 / 10
    weight, bias = weight.to(parameters), (1.0 - weight).to(parameters)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer, weight, bias


def _rows(x: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is true, as a matrix whose columns are channels."""
    return x.movedim(1, -1)[mask[:, 0]]


def _of_vectors(
    context: Context, case: Case, layer: Any, stats: Any, expected: Any, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """The errors of statistics and of parameters' gradients, with the largest ones allowed."""
    mean, var = (vector.cpu().double() for vector in stats[:2])
    std = expected.var.sqrt().clamp_min(1e-300 if case.std else abs(case.mean))
    scale = expected.var if case.std else torch.ones_like(expected.var)
    relative = ((var - expected.var).abs() / scale).max().item()
    precision = layer.running_var.dtype
    unbiased = expected.var * expected.count / (expected.count - 1)
    running = max(
        distance(layer.running_mean, expected.mean, max(expected.mean.abs().max().item(), 1.0)),
        distance(layer.running_var, unbiased, max(unbiased.max().item(), 1.0)),  # scale: it was 1 at first
    )
    errors = {
        "mean, in std": (((mean - expected.mean).abs() / std).max().item(), 4e-7),
        "variance, relative": (relative, _VARIANCE.get(dtype, 1e-6)),
        "running statistics": (running, _RUNNING[precision]),
    }
    if case.affine:
        for label, wanted in (("weight", expected.dweight), ("bias", expected.dbias)):
            found = sum(context.world.allgather(getattr(layer, label).grad.cpu().double()))
            # each rank's part is rounded to the dtype of the parameters
            errors[f"d{label}"] = distance(found, wanted, expected.sum_scale), max(1e-6, _RUNNING[precision])
    return errors


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return channels_last(x)
    if layout == "gaps":
        return torch.cat((x, x), 1)[:, : x.shape[1]]
    if layout == "offset":  # does not begin at a cache line
        return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)
    return x


def _gradient(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    if kind == "expanded":
        return dy[:, :, :1, :1].expand(dy.shape)
    if kind == "gaps":
        return laid_out(dy, "gaps")
    last = not x.is_contiguous()
    return channels_last(dy) if last != (kind == "other") else dy


def _same_layout(found: Tensor, x: Tensor) -> bool:
    """Whether ``found`` has the strides of ``x``. True if ``x`` is empty, or has gaps."""
    dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    return not dense or x.numel() == 0 or found.stride() == x.stride()
