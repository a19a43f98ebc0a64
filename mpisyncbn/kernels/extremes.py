"""Repeat in float64 what float32 cannot compute, for the channels that need it.

In float32 the square of 1e-23 is 0 or has lost its digits, and the square of 1e23 is infinite. The
results of the loops tell at no cost which channels may have suffered. Those channels are copied as
float64, and go through the same kernel again. Float64 input has no such help: its statistics are
sent as float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import loaded_torch
from .activation import NO_ACTIVATION, Activation, ActivationContext
from .protocol import Array

__all__ = [
    "backward_elementwise",
    "backward_reduce",
    "chosen_context",
    "chosen_values",
    "double",
    "local_moments",
    "normalize",
]

# Between these limits of a variance, or of a product of dy and x - mean, float32 sums keep their
# digits.
_LEAST, _MOST = 2.0**-100, 2.0**100
# Limits of invstd, by which a gradient is multiplied three times.
_SMALL, _LARGE = 2.0**-30, 2.0**30
_FLOAT = 2.0**127


def local_moments(
    kernel: Callable[[Array], tuple[int, Array, Array]],
    x: Array,
    count: int,
    mean: np.ndarray,
    m2: np.ndarray,
) -> None:
    """Correct in place the ``mean`` and ``m2`` that ``kernel`` found.

    An ``m2`` of 0 says that the channel is constant.
    """
    with np.errstate(all="ignore"):
        chosen = np.flatnonzero(~((m2 >= count * _LEAST) & (m2 <= count * _MOST)) & (m2 != 0))
    if len(chosen):
        _, found, m2[chosen] = kernel(_float64_channels(x, chosen))
        mean[chosen] = found.sum(0)


def normalize(
    kernel: Callable[..., Array],
    y: Array,
    x: Array,
    mean: np.ndarray,
    invstd: np.ndarray,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    activation: Activation,
) -> Array:
    """Correct ``y`` in place, and return it."""
    chosen = _beyond(invstd, weight)
    if len(chosen):
        vectors = [chosen_values(each, chosen) for each in (mean, invstd, weight, bias)]
        residual = _float64_channels(residual, chosen)
        _put(y, chosen, kernel(_float64_channels(x, chosen), *vectors, residual, activation))
    return y


def backward_reduce(
    kernel: Callable[..., tuple[Array, Array, Array]],
    sums: np.ndarray,
    dy: Array,
    x: Array,
    mean: np.ndarray,
    invstd: np.ndarray,
    context: ActivationContext | None,
    dz: Array | None = None,
) -> None:
    """Correct in place ``sums``, of shape (2, C): those of dz and of dz * (x - mean).

    It corrects ``dz`` too, if the kernel has stored it.
    """
    values = np.prod(x.shape) / x.shape[1]
    with np.errstate(all="ignore"):
        none = (sums == 0).all(0) & _is_ordinary(invstd)
        fine = (np.abs(sums[1]) >= values * _LEAST) & np.isfinite(sums[1])
    chosen = np.flatnonzero(~(none | fine))
    if context is not None and context.activation != NO_ACTIVATION and not context.undone:
        chosen = np.union1d(chosen, _beyond(invstd, context.weight))  # the activation's input, computed again
    if len(chosen):
        some = mean[chosen], invstd[chosen], chosen_context(context, chosen)
        *found, found_dz = kernel(_float64_channels(dy, chosen), _float64_channels(x, chosen), *some)
        if dz is not None:  # the sums are those of the stored values
            _put(dz, chosen, found_dz)
            *found, _ = kernel(_float64_channels(dz, chosen), _float64_channels(x, chosen), *some[:2])
        sums[:, chosen] = found


def backward_elementwise(
    kernel: Callable[..., Array],
    dx: Array,
    dz: Array,
    x: Array,
    mean: np.ndarray,
    invstd: np.ndarray,
    weight: Array | None,
    means: tuple[np.ndarray, np.ndarray],
    context: ActivationContext | None,
) -> Array:
    """Correct ``dx`` in place, and return it. ``means`` are those of dy and of dy * (x - mean)."""
    chosen = _beyond(invstd, weight, means[1])
    if len(chosen):
        vectors = [chosen_values(each, chosen) for each in (mean, invstd, weight, *means)]
        dz, x = _float64_channels(dz, chosen), _float64_channels(x, chosen)
        _put(dx, chosen, kernel(dz, x, *vectors, chosen_context(context, chosen)))
    return dx


def _is_ordinary(invstd: np.ndarray) -> np.ndarray:
    return (invstd == 0) | ~((invstd < _SMALL) | (invstd > _LARGE))


def _beyond(invstd: np.ndarray, weight: Array | None, mean_dy_xmu: Array = 0.0) -> np.ndarray:
    """The channels whose coefficients may be beyond float32.

    kernels/cpu/coefficients.h has the same rule.
    """
    with np.errstate(all="ignore"):
        scale = invstd if weight is None else invstd * np.asarray(double(weight))
        slope = np.where(np.isfinite(mean_dy_xmu), scale * (invstd * (invstd * mean_dy_xmu)), 0.0)
        largest = np.maximum(np.abs(scale), np.abs(slope))
        return np.flatnonzero(~_is_ordinary(invstd) | (largest >= _FLOAT))


def double(x: Array) -> Array:
    """``x`` as float64, outside autograd."""
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.detach().double()


def _float64_channels(x: Array, chosen: np.ndarray) -> Array:
    if x is None:
        return None
    if isinstance(x, np.ndarray):
        return _aligned(np.take(np.asarray(x), chosen, 1))
    return double(x[:, loaded_torch().from_numpy(chosen)])


def _aligned(x: np.ndarray) -> np.ndarray:
    """A float64 copy at a multiple of 64 bytes, as torch's are: sums then have the same order."""
    memory = np.empty(x.size + 7)
    start = -memory.ctypes.data // 8 % 8
    copy = memory[start : start + x.size].reshape(x.shape)
    copy[...] = x
    return copy


def chosen_values(vector: Array, chosen: np.ndarray) -> Array:
    """The values of a vector in the chosen channels, as float64; None for None."""
    return None if vector is None else double(vector)[chosen]


def chosen_context(context: ActivationContext | None, chosen: np.ndarray) -> ActivationContext | None:
    """The context of the chosen channels, as float64; None for None."""
    if context is None:
        return None
    weight, bias = chosen_values(context.weight, chosen), chosen_values(context.bias, chosen)
    arrays = [_float64_channels(each, chosen) for each in (context.y, context.residual)]
    return type(context)(context.activation, weight, bias, *arrays)


def _put(out: Array, chosen: np.ndarray, values: Array) -> None:
    if isinstance(out, np.ndarray):
        out[:, chosen] = values
    else:
        out[:, loaded_torch().from_numpy(chosen)] = values.to(out.dtype)
