"""The four verbs for torch tensors on a GPU where Triton is not installed, composed of the fused CUDA
operations that torch has for its own SyncBatchNorm.

Their moments are in float32, so digits of the mean are lost where it is large: 6e-8 of it. What is
known of the mean beyond float32 goes into the shift that they add.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import channels_of, dense, like, rows

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]


def local_moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    channels, exact = x.shape[1], x.dtype == torch.float64
    count = x.numel() // channels
    if count == 0:
        zeros = x.new_zeros((3, channels), dtype=torch.float64)
        return 0, zeros[:2] if exact else zeros[0], zeros[2]
    # With eps = 0 what comes of a variance is exact to its last digits but one; of none comes 0.
    mean, invstd = torch.batch_norm_stats(_readable(dense(x)), 0.0)
    mean, invstd = mean.double(), invstd.double()
    m2 = torch.where(invstd == 0, 0.0, count / invstd.square())
    return count, torch.stack((mean, torch.zeros_like(mean))) if exact else mean, m2


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    scale = invstd if weight is None else invstd * weight.double()
    shift = torch.zeros_like(mean) if bias is None else bias.double()
    x = dense(x)
    high = _narrow(mean, x)
    shift = shift - (mean - high.double()) * scale
    # With something to follow, bfloat16 and float16 are rounded after it.
    wide = x if residual is None else x.to(high.dtype)
    y = torch.empty_like(wide)  # written through a view of it: what autograd gets must not be one
    vectors = _narrow(scale, x), _narrow(shift, x), high, torch.ones_like(high)
    torch.ops.aten.batch_norm_elemt.out(_readable(wide), *vectors, 0.0, out=_readable(y))
    if residual is not None:
        y = y.add_(residual)
    return (y.relu_() if relu else y).to(x.dtype)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, gate: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    if gate is not None:
        y = normalize(x, mean, invstd, gate.weight, gate.bias) if gate.y is None else gate.y
        dy = dy.masked_fill(y <= 0, 0)
    if x.numel() == 0:
        zeros = x.new_zeros((2, x.shape[1]), dtype=torch.float64)
        return zeros[0], zeros[1], dy
    x = dense(x)
    high = _narrow(mean, x)
    sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
        _readable(like(dy, x)), _readable(x), high, torch.ones_like(high), None, True, False, False
    )
    sum_dy = sum_dy.double()
    return sum_dy, sum_dy_xmu.double() - (mean - high.double()) * sum_dy, dy


def backward_elementwise(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xmu: Tensor,
    gate: Any = None,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    x = dense(x)
    high = _narrow(mean, x)
    slope = invstd.square() * mean_dy_xmu
    # The operation divides sums by a count: of means, 1.
    dx = torch.batch_norm_backward_elemt(
        _readable(like(dz, x)),
        _readable(x),
        high,
        _narrow(invstd, x),
        None if weight is None else weight.to(high.dtype).contiguous(),
        _narrow(mean_dy - (mean - high.double()) * slope, x),
        _narrow(mean_dy_xmu, x),
        torch.ones(1, dtype=torch.int32, device=x.device),
    )
    return dx if dx.ndim == x.ndim else channels_of(dx, x)


def _narrow(vector: Tensor, x: Tensor) -> Tensor:
    """A vector in the dtype in which the operations take it with ``x``."""
    return vector.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _readable(x: Tensor) -> Tensor:
    """A dense tensor in a layout that the operations have fast code for."""
    return x if x.is_contiguous() else rows(x)
