"""The four kernels for torch tensors in host memory, if the native ones were not built.

They are composed of the fastest fitting ATen operations.

Statistics are NumPy float64 vectors, because on a few hundred values NumPy's calls cost a third of
torch's. ATen's own batch-norm moments serve only small input: on contiguous tensors they are scalar
code, and on channels_last ones they are plain float32 sums, which lose half of the digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import extremes
from .activation import (
    NO_ACTIVATION,
    Activation,
    ActivationContext,
    Kind,
    activate,
    activation_gradient,
    input_gradient,
    undo,
)
from .layout import dense, rows, with_strides_of

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize"]

# Up to this many values, ATen's scalar moments take less time than the calls of vectorized ones.
_SMALL = 1 << 14
# They also need at most this many values per channel, because their sums may be plain float32.
_SHORT = 256
# Values per chunk: enough to hide the cost of a call, few enough to stay in a core's L2 cache.
_CHUNK = 1 << 18
# Longest run of float32 values that one sum may add up, where ATen's sums are not pairwise.
_BLOCK = 4096
# Beyond this |mean| / std, x * scale + shift in float32 loses digits that (x - mean) * scale keeps.
_LARGE_RATIO = 32.0


def local_moments(x: Tensor) -> tuple[int, np.ndarray, np.ndarray]:
    channels = x.shape[1]
    count = x.numel() // channels
    if count == 0:
        mean_hi, mean_lo, m2 = np.zeros((3, channels))
    elif x.numel() <= _SMALL and count <= _SHORT:
        mean_hi, mean_lo, m2 = _small_moments(x, count)
    else:
        mean_hi, mean_lo, m2 = _large_moments(x, count)
    if x.dtype == torch.float64:
        return count, np.stack((mean_hi, mean_lo)), m2
    mean = mean_hi + mean_lo
    if count:
        _mark_underflowed(x, m2)
        extremes.local_moments(local_moments, x, count, mean, m2)
    return count, mean, m2


def normalize(
    x: Tensor,
    mean: np.ndarray,
    invstd: np.ndarray,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: Activation = NO_ACTIVATION,
) -> Tensor:
    scale = invstd if weight is None else invstd * _numpy(weight)
    shift = np.zeros_like(scale) if bias is None else _numpy(bias)
    # bfloat16 and float16 are rounded once, after a residual and an activation
    is_last = residual is None and activation.kind <= Kind.RELU
    y = _affine(x if is_last else x.to(_compute_dtype(x)), mean, invstd, scale, shift)
    if residual is not None:
        y = y.add_(residual)
    y = activate(y, activation, in_place=True).to(x.dtype)
    if x.dtype == torch.float64 or not x.numel():
        return y
    return extremes.normalize(normalize, y, x, mean, invstd, weight, bias, residual, activation)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: np.ndarray, invstd: np.ndarray, context: ActivationContext | None = None
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    if context is not None and context.undone:
        wide = x.to(_compute_dtype(x))
        dz = activation_gradient(dy.to(wide.dtype), wide, context.activation).to(dy.dtype)
        undone = undo(wide, context.activation)
        return *backward_reduce(dz.to(wide.dtype), undone, mean, invstd)[:2], dz
    if context is not None:
        dy = input_gradient(normalize, dy, x, mean, invstd, context)
    sums = np.stack(_sums(dy, x, mean))
    if x.dtype != torch.float64 and x.numel():
        extremes.backward_reduce(backward_reduce, sums, dy, x, mean, invstd, None)
    return sums[0], sums[1], dy


def backward_elementwise(
    dz: Tensor,
    x: Tensor,
    mean: np.ndarray,
    invstd: np.ndarray,
    weight: Tensor | None,
    mean_dy: np.ndarray,
    mean_dy_xmu: np.ndarray,
    context: ActivationContext | None = None,
) -> Tensor:
    scale = invstd if weight is None else invstd * _numpy(weight)
    # bfloat16 and float16 are rounded once, at the end.
    wide = x.to(_compute_dtype(x))
    if context is not None and context.undone:
        wide = undo(wide, context.activation)
    slope = invstd * (invstd * mean_dy_xmu)
    dx = _affine(wide, mean, invstd, scale * -slope, scale * -mean_dy)
    dx = dx.addcmul_(dz.to(dx.dtype), _channels(_vector(scale, x), x)).to(x.dtype)
    if x.dtype == torch.float64 or not x.numel():
        return dx
    means = mean_dy, mean_dy_xmu
    return extremes.backward_elementwise(
        backward_elementwise, dx, dz, x, mean, invstd, weight, means, context
    )


def _sums(dy: Tensor, x: Tensor, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    channels = x.shape[1]
    if x.numel() == 0:
        return np.zeros(channels), np.zeros(channels)
    x = dense(x)
    dy = with_strides_of(x, dy)
    mean_hi = _vector(mean, x)
    if x.numel() > _BLOCK * channels and _channels_side_by_side(x):
        # ATen's sums are plain float32 in this layout: keep them short, and add them up in float64.
        blocks = zip(rows(dy).split(_BLOCK), rows(x).split(_BLOCK), strict=True)
        sums = np.array([_given_mean_sums(*block, mean_hi) for block in blocks])
        sum_dy, sum_dy_xmu = sums.sum(0, dtype=np.float64)
    else:
        sum_dy, sum_dy_xmu = _given_mean_sums(_aten(dy), _aten(x), mean_hi)
        sum_dy = sum_dy.astype(np.float64)
    return sum_dy, sum_dy_xmu - (mean - mean_hi.numpy()) * sum_dy


def _small_moments(x: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = x.to(_compute_dtype(x)).contiguous()
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    mean_hi, m2 = mean.numpy().astype(np.float64), var.numpy().astype(np.float64)
    mean_lo = 0.0 * mean_hi
    # Each channel must stay below the limit, and the sum over channels is an upper bound of each.
    if not mean_hi.dot(mean_hi / (m2 + 1e-200)) <= _LARGE_RATIO**2:
        # The mean was rounded to the dtype of x: find the part that is missing.
        missing, var = torch.batch_norm_update_stats(x - _channels(mean, x), None, None, 0.0)
        mean_lo, m2 = missing.numpy().astype(np.float64), var.numpy().astype(np.float64)
    m2 *= count
    return mean_hi, mean_lo, m2


def _large_moments(x: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = list(_blocks(x))
    origin = blocks[0].mean((0, 2), dtype=_compute_dtype(x))
    mean_hi, mean_lo, m2 = _moments_about(origin, blocks, count)
    if np.any(mean_lo * mean_lo * count > 4 * m2):
        # The first block was not typical, so squares of distances from its mean have lost digits.
        mean_hi, mean_lo, m2 = _moments_about(_vector(mean_hi + mean_lo, x), blocks, count)
    return mean_hi, mean_lo, np.maximum(m2, 0.0)


def _moments_about(
    origin: Tensor, blocks: list[Tensor], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean in two parts and M2, from the sums of ``x - origin`` and of its square.

    Sums within a block are in the compute dtype, sums over blocks in float64.
    """
    column = origin[:, None]
    scratch = origin.new_empty(max(block.numel() for block in blocks))
    sums, squares = [], []
    for block in blocks:
        distances = torch.sub(block, column, out=scratch[: block.numel()].view(block.shape))
        sums.append(_total(distances))
        squares.append(_total(distances.square_()))
    total = _numpy(torch.cat(sums)).sum(0, dtype=np.float64)
    total_of_squares = _numpy(torch.cat(squares)).sum(0, dtype=np.float64)
    mean_lo = total / count
    return _numpy(origin).astype(np.float64), mean_lo, total_of_squares - total * mean_lo


def _mark_underflowed(x: Tensor, m2: np.ndarray) -> None:
    """Set ``m2`` to NaN for channels that are not constant, although their squares are all 0."""
    chosen = np.flatnonzero(m2 == 0)
    if len(chosen):
        part = x if len(chosen) == len(m2) else x[:, torch.from_numpy(chosen)]
        axes = (0, *range(2, x.ndim))
        m2[chosen[(part.amax(axes) != part.amin(axes)).numpy()]] = np.nan


def _total(block: Tensor) -> Tensor:
    """Sums of shape ``(*, C)`` over the longer axis of a block.

    ATen adds up pairwise along it, which keeps the digits.
    """
    return block.sum(2) if block.shape[2] > 1 else block.sum(0).T


def _given_mean_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The sums of ``dy`` and of ``dy * (x - mean)`` per channel.

    ATen computes them as the gradients of bias and weight, for a given mean and a variance of 1.
    """
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, mean, _ones(mean), None, None, False, 0.0, [False, True, True]
    )
    return total.numpy(), dot.numpy()


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Yield pieces of ``x``, in the order of memory, as ``(n, C, s)`` views that fit the cache."""
    channels = x.shape[1]
    x = dense(x)
    if _channels_side_by_side(x):
        yield from rows(x).unsqueeze(2).split(max(1, _CHUNK // channels))
    else:
        planes = x.reshape(x.shape[0], channels, -1)
        length = min(planes.shape[2], max(_BLOCK, _CHUNK // channels))
        for samples in planes.split(max(1, _CHUNK // (channels * length))):
            yield from samples.split(length, dim=2)


def _affine(x: Tensor, mean: np.ndarray, invstd: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> Tensor:
    """``(x - mean) * scale + shift``, in the dtype of ``x``, or float32 if the digits need it."""
    if x.numel() == 0:
        return torch.empty_like(x)
    x = dense(x)
    ratio = mean * invstd
    # the norm is an upper bound of the maximum, and far cheaper
    if not ratio.dot(ratio) <= _LARGE_RATIO**2 and not np.abs(ratio).max() <= _LARGE_RATIO:
        mean_hi = _vector(mean, x)
        x = x - _channels(mean_hi, x)
        mean = mean - mean_hi.numpy()
    center = _vector(mean, x)
    arguments = _vector(scale, x), _vector(shift, x), center, _ones(center), False, 0.0, 0.0
    if _is_vectorized(x):
        return torch.native_batch_norm(x, *arguments)[0]
    y = torch.empty_like(x)  # autograd must not get a view, so a view of it is written to
    none = center.new_empty(0)
    torch.ops.aten.native_batch_norm.out(rows(x), *arguments, out=rows(y), save_mean=none, save_invstd=none)
    return y


def _channels_side_by_side(x: Tensor) -> bool:
    return not x.is_contiguous() or x.shape[2:].numel() == 1


def _is_vectorized(x: Tensor) -> bool:
    return (
        x.is_contiguous()
        or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _aten(x: Tensor) -> Tensor:
    """A dense ``x`` in a layout for which ATen's batch norm has vectorized code."""
    return x if _is_vectorized(x) else rows(x)


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view((-1,) + (1,) * (x.ndim - 2))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _vector(values: np.ndarray, x: Tensor) -> Tensor:
    """A vector of length C in the compute dtype of ``x``."""
    return torch.from_numpy(values.astype(_numpy_dtype(x.dtype)))


def _numpy_dtype(dtype: torch.dtype) -> type[np.floating]:
    return np.float64 if dtype == torch.float64 else np.float32


def _numpy(vector: Tensor) -> np.ndarray:
    # clone() resolves a set neg bit, and fills in an efficient zero tensor: numpy() cannot.
    vector = vector.detach().clone()
    return (vector if vector.dtype in (torch.float32, torch.float64) else vector.float()).numpy()


@lru_cache(maxsize=64)
def _numpy_ones(length: int, dtype: torch.dtype) -> np.ndarray:
    return np.ones(length, _numpy_dtype(dtype))


def _ones(like: Tensor) -> Tensor:
    # torch.ones would follow a default device that the user has set
    return torch.from_numpy(_numpy_ones(len(like), like.dtype))
