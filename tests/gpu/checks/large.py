"""Point 3 of scripts/gpu_check: more than 2**31 values, against float64 sums over chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpisyncbn import functional

from .context import Context
from .reference import BARS

_SHAPE = (33, 64, 1024, 1024)  # 2.2e9 values
_SMALL = (5, 8, 16, 16)  # used on a CPU


def tensors(context: Context) -> None:
    """Check large tensors one after the other, because they take much memory.

    Run it with one rank: it calls collective functions, but expects the results of one rank's data.
    """
    for kernels in ("cuda", "aten_cuda")[: 2 if context.on_gpu else 1]:
        try:
            serving = context.served_by(kernels)
        except ImportError as error:
            context.records.skip(kernels, str(error))
            continue
        with serving:
            _cases(context, kernels)


def _cases(context: Context, kernels: str) -> None:
    records = context.records
    cases = [(torch.bfloat16, "contiguous"), (torch.bfloat16, "channels_last"), (torch.float32, "contiguous")]
    for dtype, layout in cases[:1] if context.quick else cases:
        name = f"{kernels}, {str(dtype).rpartition('.')[2]}, {layout}"
        needed = 4 * 33 * 64 * 1024**2 * dtype.itemsize + (6 << 30)
        if context.on_gpu and torch.cuda.mem_get_info(context.device)[0] < needed:
            records.skip(name, f"it takes {needed / 1e9:.0f} GB of the device's memory")
            continue
        with records.trying(name):
            _check(context, dtype, layout, name, exact=kernels == "cuda")
        if context.on_gpu:
            torch.cuda.empty_cache()


def _check(context: Context, dtype: torch.dtype, layout: str, name: str, exact: bool) -> None:
    device, records = context.device, context.records
    shape = _SHAPE if context.on_gpu else _SMALL
    x, dy = _data(shape, dtype, layout, device, 0.7), _data(shape, dtype, layout, device, 0.1)
    channels = shape[1]
    weight = 0.5 + torch.arange(channels, device=device).float() % 11 / 10
    bias = 1.0 - weight
    y, stats = functional.batch_norm_forward(x, weight, bias)
    dx, dweight, dbias = functional.batch_norm_backward(dy, x, stats, weight)
    context.synchronize()

    count = x.numel() // channels
    zeros = torch.zeros(channels, dtype=torch.float64, device=device)
    mean = sum((_sums(part) for part in _chunks(x)), zeros) / count
    var = sum((_sums((part - _wide(mean)).square()) for part in _chunks(x)), zeros) / count
    invstd = (var + 1e-5).rsqrt()
    sum_dy = sum((_sums(part) for part in _chunks(dy)), zeros)
    both = zip(_chunks(x), _chunks(dy), strict=True)
    sum_dy_xhat = sum((_sums(g * (part - _wide(mean)) * _wide(invstd)) for part, g in both), zeros)
    errors = {
        "mean, in std": (((stats.mean - mean).abs() * invstd).max().item(), 4e-7),
        "variance, relative": (((stats.var - var).abs() / var).max().item(), 1e-6),
        "dbias": (((dbias - sum_dy).abs().max() / count).item(), 1e-6),
        "dweight": (((dweight - sum_dy_xhat).abs().max() / count).item(), 1e-6),
    }
    for what, (error, bar) in errors.items():
        if exact:
            records.at_most(f"{name}: {what}", error, bar)
        else:  # torch's operations add up this many values in float32
            records.figure(f"{name}: {what}", error)
    worst_y = worst_dx = 0.0
    for part, g, got_y, got_dx in zip(*map(_chunks, (x, dy, y, dx)), strict=True):
        xhat = (part - _wide(mean)) * _wide(invstd)
        expected = xhat * _wide(weight) + _wide(bias)
        worst_y = _worse(worst_y, (got_y - expected).abs().max() / expected.abs().max())
        scale = _wide(invstd * weight)
        expected = (g - _wide(sum_dy / count) - xhat * _wide(sum_dy_xhat / count)) * scale
        worst_dx = _worse(worst_dx, (got_dx - expected).abs().max() / (g * scale).abs().max())
    records.at_most(f"{name}: y", worst_y, BARS[dtype])
    records.at_most(f"{name}: dx", worst_dx, BARS[dtype])


def _data(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device, mean: float
) -> Tensor:
    """Normal values. Each sample has its own mean and spread, so that no two parts are alike."""
    last = layout == "channels_last"
    x = torch.empty((shape[0], *shape[2:], shape[1]) if last else shape, dtype=dtype, device=device)
    for number, sample in enumerate(x):
        sample.normal_(mean + number / 10, 1 + number / 20)
    return x.movedim(-1, 1) if last else x


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """The samples one by one, in float64."""
    return (x[number : number + 1].double() for number in range(len(x)))


def _sums(part: Tensor) -> Tensor:
    return part.sum((0, 2, 3))


def _wide(vector: Tensor) -> Tensor:
    return vector.double().view(1, -1, 1, 1)


def _worse(worst: float, found: Tensor) -> float:
    value = found.item()
    return value if not value <= worst else worst
