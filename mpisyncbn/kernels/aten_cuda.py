"""The four kernels for torch tensors on a GPU, if Triton is not installed.

They are composed of the fused CUDA operations that torch has for its own SyncBatchNorm.

Those compute moments in float32, so a large mean is wrong by up to 6e-8 of it. The part of a mean
that float32 cannot hold goes into the shift that they add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import NO_ACTIVATION, Activation, ActivationContext, Kind, activate, input_gradient
from .layout import channels_of, dense, rows, with_strides_of

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]


def local_moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    channels, is_float64 = x.shape[1], x.dtype == torch.float64
    count = x.numel() // channels
    if count == 0:
        zeros = x.new_zeros((3, channels), dtype=torch.float64)
        return 0, zeros[:2] if is_float64 else zeros[0], zeros[2]
    # With eps = 0, the variance can be computed from invstd, but for its last digit. invstd is 0
    # for a variance of 0.
    mean, invstd = torch.batch_norm_stats(_readable(dense(x)), 0.0)
    mean, invstd = mean.double(), invstd.double()
    m2 = torch.where(invstd == 0, 0.0, count / invstd.square())
    return count, torch.stack((mean, torch.zeros_like(mean))) if is_float64 else mean, m2


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: Activation = NO_ACTIVATION,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    scale = invstd if weight is None else invstd * weight.double()
    shift = torch.zeros_like(mean) if bias is None else bias.double()
    x = dense(x)
    mean_hi = _narrow(mean, x)
    shift = shift - (mean - mean_hi.double()) * scale
    # bfloat16 and float16 are rounded once, after a residual and an activation
    is_last = residual is None and activation.kind <= Kind.RELU
    wide = x if is_last else x.to(mean_hi.dtype)
    y = torch.empty_like(wide)  # autograd must not get a view, so a view of it is written to
    vectors = _narrow(scale, x), _narrow(shift, x), mean_hi, torch.ones_like(mean_hi)
    torch.ops.aten.batch_norm_elemt.out(_readable(wide), *vectors, 0.0, out=_readable(y))
    if residual is not None:
        y = y.add_(residual)
    return activate(y, activation, in_place=True).to(x.dtype)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, context: ActivationContext | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if context is not None:
        dy = input_gradient(normalize, dy, x, mean, invstd, context)
    if x.numel() == 0:
        zeros = x.new_zeros((2, x.shape[1]), dtype=torch.float64)
        return zeros[0], zeros[1], dy
    x = dense(x)
    mean_hi = _narrow(mean, x)
    # the operation rounds sums over planes to the dtype of what it reads
    dtype = mean_hi.dtype if x.is_contiguous() else x.dtype
    sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
        _readable(with_strides_of(x, dy).to(dtype)),
        _readable(x.to(dtype)),
        mean_hi,
        torch.ones_like(mean_hi),
        None,
        True,
        False,
        False,
    )
    sum_dy = sum_dy.double()
    return sum_dy, sum_dy_xmu.double() - (mean - mean_hi.double()) * sum_dy, dy


def backward_elementwise(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xmu: Tensor,
    context: ActivationContext | None = None,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    x = dense(x)
    mean_hi = _narrow(mean, x)
    slope = invstd.square() * mean_dy_xmu
    # The operation divides sums by a count. These are means, so the count is 1.
    dx = torch.batch_norm_backward_elemt(
        _readable(with_strides_of(x, dz)),
        _readable(x),
        mean_hi,
        _narrow(invstd, x),
        None if weight is None else weight.to(mean_hi.dtype).contiguous(),
        _narrow(mean_dy - (mean - mean_hi.double()) * slope, x),
        _narrow(mean_dy_xmu, x),
        torch.ones(1, dtype=torch.int32, device=x.device),
    )
    return dx if dx.ndim == x.ndim else channels_of(dx, x)


def _narrow(vector: Tensor, x: Tensor) -> Tensor:
    """A vector in the dtype that the operations want beside ``x``."""
    return vector.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _readable(x: Tensor) -> Tensor:
    """A dense tensor in a layout for which the operations have fast code."""
    return x if x.is_contiguous() else rows(x)
