"""The four kernels with a mask, for any array: ``generic`` with 0 where the mask is false.

Values become 0 there before anything is computed with them, and so do results. NaN and infinity
there have no effect, in derivatives of any order.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import MPISyncBNError, on_rank
from . import generic
from .activation import NO_ACTIVATION, Activation, ActivationContext
from .protocol import Array

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["where_true", "with_mask"]


class MaskedKernels(NamedTuple):
    """The four kernels of a module with one mask: ``protocol.Kernels``."""

    local_moments: Callable[..., tuple[int, Array, Array]]
    normalize: Callable[..., Array]
    backward_reduce: Callable[..., tuple[Array, Array, Array]]
    backward_elementwise: Callable[..., Array]


def with_mask(module: object, mask: Array) -> MaskedKernels:
    """The kernels of a module whose functions take a ``mask``, bound to this mask."""
    return MaskedKernels._make(partial(getattr(module, name), mask=mask) for name in MaskedKernels._fields)


def where_true(x: Array, mask: Array | None) -> Array:
    """``x`` where the mask is true, and 0 elsewhere. ``x`` itself if it or the mask is None."""
    if x is None or mask is None:
        return x
    if hasattr(x, "is_cpu"):  # torch
        import torch

        return torch.where(mask, x, 0)  # masked_fill would forget channels_last
    return np.where(mask, x, x.dtype.type(0))


def local_moments(x: Array, *, mask: Array) -> tuple[int, Array, Array]:
    _refuse_capture(mask)
    count = mask.sum().item()  # waits for a device: the exchange needs the number
    clear = partial(where_true, mask=mask)
    return count, *generic.mean_and_m2(clear(x), count, clear)


def normalize(
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None = None,
    activation: Activation = NO_ACTIVATION,
    *,
    mask: Array,
) -> Array:
    mean, invstd = _vectors_like(x, mean, invstd)
    x, residual = where_true(x, mask), where_true(residual, mask)
    y = generic.normalize(x, mean, invstd, weight, bias, residual, activation)
    return where_true(y, mask)


def backward_reduce(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    context: ActivationContext | None = None,
    *,
    mask: Array,
) -> tuple[Array, Array, Array]:
    mean_read, invstd_read = _vectors_like(x, mean, invstd)
    dy, x, context = where_true(dy, mask), where_true(x, mask), _context_where_true(context, mask)
    dz, x = generic.through_activation(dy, x, mean_read, invstd_read, context)
    dz = where_true(dz, mask)
    sum_dz, sum_dz_xmu = generic.sums(dz, x, mean_read)
    if mean_read is not mean:
        sum_dz, sum_dz_xmu = sum_dz.numpy(), sum_dz_xmu.numpy()
    return sum_dz, sum_dz_xmu, dz


def backward_elementwise(
    dz: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None,
    mean_dy: Array,
    mean_dy_xmu: Array,
    context: ActivationContext | None = None,
    *,
    mask: Array,
) -> Array:
    mean, invstd, mean_dy, mean_dy_xmu = _vectors_like(x, mean, invstd, mean_dy, mean_dy_xmu)
    dz, x = where_true(dz, mask), where_true(x, mask)
    means = mean_dy, mean_dy_xmu
    dx = generic.backward_elementwise(dz, x, mean, invstd, weight, *means, _context_where_true(context, mask))
    return where_true(dx, mask)


def _refuse_capture(mask: Array) -> None:
    if getattr(mask, "is_cuda", False):
        import torch

        if torch.cuda.is_current_stream_capturing():
            raise MPISyncBNError(
                "a synchronized batch norm with a mask cannot be captured in a CUDA graph, because the host "
                "reads the number of true positions at every training step"
                f"{on_rank()}: leave it out of what is captured"
            )


def _vectors_like(x: Array, *vectors: Array) -> tuple[Array, ...]:
    """The vectors as torch tensors if ``x`` is one. For host memory they come as NumPy arrays."""
    if not hasattr(x, "is_cpu") or not isinstance(vectors[0], np.ndarray):
        return vectors
    import torch

    return tuple(map(torch.from_numpy, vectors))


def _context_where_true(context: ActivationContext | None, mask: Array) -> ActivationContext | None:
    return None if context is None else context._replace(residual=where_true(context.residual, mask))
