"""Slow versions for host memory of the operations that torch's SyncBatchNorm has on CUDA alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EMULATED"]


def _per_channel(x: Tensor) -> tuple[list[int], tuple[int, ...]]:
    assert x.is_contiguous(), "the fast code reads contiguous tensors"
    return [d for d in range(x.ndim) if d != 1], (1, -1) + (1,) * (x.ndim - 2)


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dims, view = _per_channel(x)
    wide = x.double()
    mean = wide.mean(dims)
    var = (wide - mean.view(view)).square().mean(dims)
    invstd = torch.where((var == 0) & (eps == 0), 0.0, (var + eps).rsqrt())
    return mean.to(_working(x)), invstd.to(_working(x))


def _elemt(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float, *, out: Tensor
) -> Tensor:
    _, view = _per_channel(x)
    assert {v.dtype for v in (weight, bias, mean, invstd)} == {_working(x)}
    y = (x.to(_working(x)) - mean.view(view)) * (invstd * weight).view(view) + bias.view(view)
    return out.copy_(y)


def _elemt_alone(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return _elemt(x, weight, bias, mean, invstd, eps, out=torch.empty_like(x))


def _gather(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    weights = counts.to(mean.dtype).view(-1, 1)
    total = weights.sum()
    whole = (mean * weights).sum(0) / total
    var = ((invstd**-2 - eps + (mean - whole).square()) * weights).sum(0) / total
    if running_mean is not None:
        running_mean.lerp_(whole, momentum)
        running_var.lerp_(var * total / (total - 1), momentum)
    return whole, (var + eps).rsqrt()


def _reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    x_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, ...]:
    dims, view = _per_channel(x)
    assert dy.is_contiguous()
    assert mean.dtype == invstd.dtype == _working(x)
    wide = dy.double()
    sum_dy_xmu = (wide * (x.double() - mean.double().view(view))).sum(dims)
    sums = wide.sum(dims).to(mean.dtype), sum_dy_xmu.to(mean.dtype)
    return (
        *sums,
        sums[1] * invstd if weight_g else mean.new_empty(0),
        sums[0] if bias_g else mean.new_empty(0),
    )


def _backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    _, view = _per_channel(x)
    assert dy.is_contiguous()
    assert count.dtype == torch.int32
    assert {v.dtype for v in (mean, invstd, sum_dy, sum_dy_xmu)} == {_working(x)}
    wide, total = dy.to(mean.dtype), count.sum()
    slope = invstd.square() * sum_dy_xmu / total
    scale = invstd if weight is None else invstd * weight
    xmu = x.to(mean.dtype) - mean.view(view)
    return ((wide - (sum_dy / total).view(view) - xmu * slope.view(view)) * scale.view(view)).to(x.dtype)


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


EMULATED = {
    "batch_norm_stats": _stats,
    "batch_norm_elemt.out": _elemt,
    "batch_norm_elemt": _elemt_alone,
    "batch_norm_gather_stats_with_counts": _gather,
    "batch_norm_backward_reduce": _reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}
