"""The four kernels for any array: NumPy, CuPy, or torch on any device. They are the reference.

They use only operators and methods that all three libraries share. So one source does for all, and
torch can differentiate through it any number of times, forward and backward. Products and sums
are in float64, on devices that have it. Element-wise work is in float32 (float64 for float64
input), and multiplies by invstd, never by its square, which may be beyond the range of float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .activation import NO_ACTIVATION, Activation, ActivationContext, activate, activation_gradient, undo
from .protocol import Array

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["backward_elementwise", "backward_reduce", "has_float64", "local_moments", "normalize"]

DType: TypeAlias = "str | np.dtype | torch.dtype"  # a name stands for the dtype of x's own library


def local_moments(x: Array) -> tuple[int, Array, Array]:
    count = _values_per_channel(x)
    return count, *mean_and_m2(x, count, lambda distances: distances)


def mean_and_m2(x: Array, count: int, clear: Callable[[Array], Array]) -> tuple[Array, Array]:
    """The mean and M2 of ``count`` values per channel.

    ``clear`` sets distances from the mean to 0 if their values do not count. Those are 0 in ``x``.
    """
    # A sum over nothing is 0, so an empty batch needs no branch: only a division by 0 must be
    # avoided.
    mean = _sum(x) / max(count, 1)
    xmu = clear(_center(x, mean))
    if str(x.dtype).endswith("float64"):
        # A mean of float64 values is rounded. With the rest, distances in a constant channel are 0.
        rest = _sum(xmu) / max(count, 1)
        mean, xmu = _stack(mean, rest), clear(xmu - _channels(rest, x))
    return mean, _dot(xmu, xmu)


def normalize(
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None = None,
    activation: Activation = NO_ACTIVATION,
) -> Array:
    return _cast(activate(_affine(x, mean, invstd, weight, bias, residual), activation), x.dtype)


def backward_reduce(
    dy: Array, x: Array, mean: Array, invstd: Array, context: ActivationContext | None = None
) -> tuple[Array, Array, Array]:
    dz, x = through_activation(dy, x, mean, invstd, context)
    return *sums(dz, x, mean), dz


def through_activation(
    dy: Array, x: Array, mean: Array, invstd: Array, context: ActivationContext | None
) -> tuple[Array, Array]:
    """The gradient of the activation's input, and the layer's input."""
    if context is None:
        return dy, x
    activation, weight, bias, z, residual = context
    if context.undone:
        z, x = x, _undone(x, activation)
    elif z is None:
        z = _affine(x, mean, invstd, weight, bias, residual)
    dz = activation_gradient(_cast(dy, z.dtype), z, activation)
    return _cast(dz, dy.dtype) if context.stores_dz else dz, x  # it is the residual's gradient if stored


def sums(dz: Array, x: Array, mean: Array) -> tuple[Array, Array]:
    """The sums of dz and of dz * (x - mean)."""
    return _sum(dz), _dot(dz, _center(x, mean))


def backward_elementwise(
    dz: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None,
    mean_dy: Array,
    mean_dy_xmu: Array,
    context: ActivationContext | None = None,
) -> Array:
    found = _undone(x, context.activation) if context is not None and context.undone else x
    xhat = _center(found, mean) * _channels(invstd, x)
    dx = _center(dz, mean_dy) - xhat * _channels(invstd * mean_dy_xmu, x)
    if weight is not None:
        dx = dx * _channels(weight, x)
    return _cast(dx * _channels(invstd, x), x.dtype)


def _affine(
    x: Array, mean: Array, invstd: Array, weight: Array | None, bias: Array | None, residual: Array | None
) -> Array:
    """``(x - mean) * invstd * weight + bias + residual`` in the compute dtype."""
    z = _center(x, mean) * _channels(invstd, x)
    if weight is not None:
        z = z * _channels(weight, x)
    if bias is not None:
        z = z + _channels(bias, x)
    return z if residual is None else z + residual


def _undone(y: Array, activation: Activation) -> Array:
    return undo(_cast(y, _compute_dtype(y)), activation)


def _values_per_channel(x: Array) -> int:
    count = x.shape[0]
    for length in x.shape[2:]:
        count = count * length
    return count


def _center(x: Array, mean: Array) -> Array:
    """``x - mean`` in the compute dtype, as exact as if ``mean`` had been subtracted in float64.

    A float32 mean of 1e3 may be 3e-5 wrong, so the part that it misses is subtracted too.
    """
    dtype = _compute_dtype(x)
    mean_hi = _cast(mean, dtype)
    mean_lo = _cast(mean - _cast(mean_hi, mean.dtype), dtype)
    return (_cast(x, dtype) - _channels(mean_hi, x)) - _channels(mean_lo, x)


def _stack(first: Array, second: Array) -> Array:
    if hasattr(first, "to"):
        import torch

        return torch.stack((first, second))
    return np.stack((first, second))


def _sum(x: Array) -> Array:
    """The sum per channel, in float64."""
    axes = (0, *range(2, x.ndim))
    return x.sum(axes, dtype=_sum_dtype(x))


def _dot(a: Array, b: Array) -> Array:
    """The sum of products per channel, in float64: float32 could not hold all products."""
    return _sum(_cast(a, _sum_dtype(b)) * _cast(b, _sum_dtype(b)))


def _sum_dtype(x: Array) -> DType:
    return _named_dtype(x, "float64" if has_float64(x) else "float32")


def has_float64(x: Array) -> bool:
    """Whether the device of ``x`` can compute in float64. Apple's and some of Intel's cannot."""
    device = getattr(getattr(x, "device", None), "type", "cpu")
    if device == "xpu":
        import torch

        return torch.xpu.get_device_properties(x.device).has_fp64
    return device != "mps"


def _channels(vector: Array, x: Array) -> Array:
    """``vector`` of length C in the compute dtype of ``x``, shaped to broadcast against it."""
    return _cast(vector, _compute_dtype(x)).reshape((1, -1) + (1,) * (x.ndim - 2))


def _compute_dtype(x: Array) -> DType:
    return _named_dtype(x, "float64" if str(x.dtype).endswith("float64") else "float32")


def _cast(x: Array, dtype: DType) -> Array:
    dtype = _named_dtype(x, dtype) if isinstance(dtype, str) else dtype
    if x.dtype == dtype:
        return x
    return x.to(dtype) if hasattr(x, "to") else x.astype(dtype)


def _named_dtype(x: Array, name: str) -> DType:
    if not hasattr(x, "to"):  # NumPy and CuPy take the name itself
        return name
    import torch

    return getattr(torch, name)
