"""The backward kernels that read a layer's output in place of its input.

A layer that keeps its output y for the backward pass need not keep its input x, if x can be
computed from y (Rota Bulo, Porzi and Kontschieder 2018). Let z be the activation's input: y itself
or, with a leaky ReLU, y divided by the slope where it is negative. Then ``x - mean = (z - bias) /
(weight * invstd)``. So the kernels get z in place of x and the bias in place of the mean, and the
sums of a channel are divided by its weight * invstd.

The rounding of y becomes an error of x. Channels in which it is too large keep their x beside y.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import loaded_torch
from .activation import NO_ACTIVATION, Activation, ActivationContext, UndoneContext
from .extremes import chosen_context, chosen_values, double
from .protocol import BackwardKernels

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DTYPES", "FromOutput", "channels_to_keep"]


class _Limits(NamedTuple):
    """The limits of a dtype within which x can be computed from y."""

    rounding: float  # the relative error of y
    least: float  # the absolute error of a y that is too small to have all digits
    most: float  # the largest y
    bias: float  # the largest bias, in standard deviations of z


# Half precision is left out: gradients had up to nine times the error of the plain layer's. For
# float64 the limits are far from the ends of its range: extremes.py has no wider dtype.
_LIMITS = {
    "float64": _Limits(2.0**-53, 2.0**-400, 2.0**400, 8.0),
    "float32": _Limits(2.0**-24, 2.0**-126, 2.0**126, 8.0),
}
DTYPES = tuple(_LIMITS)
_SMALLEST_INVSTD, _LARGEST_INVSTD = 2.0**-200, 2.0**200


def channels_to_keep(
    dtype: str,
    var: np.ndarray,
    invstd: np.ndarray,
    count: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation,
) -> np.ndarray:
    """The indices of the channels that must keep their input: the output's rounding is too coarse.

    ``var``, ``invstd`` and ``count`` are those of the group's batch, so ranks with equal parameters
    choose equally. Constant channels, and those with values that are not finite, are among them.
    """
    limits = _LIMITS[dtype]
    slope = 1.0 if activation == NO_ACTIVATION else activation.parameter
    size = 1.0 if weight is None else np.abs(_numpy(weight))
    offset = 0.0 if bias is None else np.abs(_numpy(bias))
    with np.errstate(all="ignore"):
        spread = size * np.sqrt(var) * invstd  # the standard deviation of z
        offset = offset + limits.least / min(slope, 1.0) / limits.rounding
        # no value is more than sqrt(count) standard deviations from the mean
        largest = (spread * math.sqrt(count) + offset) * max(slope, 1.0)
        found_again = (
            (offset <= limits.bias * spread)
            & (largest <= limits.most)
            & (size * invstd >= limits.least)
            & (invstd >= _SMALLEST_INVSTD)
            & (invstd <= _LARGEST_INVSTD)
            & (limits.least <= slope <= limits.most)  # its reciprocal is a number of the dtype too
        )
    return np.flatnonzero(~found_again)


class FromOutput:
    """The two kernels of one backward pass, whose ``x`` is the layer's output, in host memory.

    ``kernels`` are any for torch tensors in host memory. ``chosen`` are the channels whose input
    was kept, and ``kept`` is that input, or None if there are none.
    """

    def __init__(
        self,
        kernels: BackwardKernels,
        weight: Tensor | None,
        bias: Tensor | None,
        chosen: np.ndarray,
        kept: Tensor | None,
    ) -> None:
        self.kernels, self.chosen, self.kept = kernels, chosen, kept
        self.divisor = 1.0 if weight is None else _numpy(weight)
        self.bias = None if bias is None else _numpy(bias)
        self.dz_kept: Tensor | None = None

    def backward_reduce(
        self,
        dy: Tensor,
        x: Tensor,
        mean: np.ndarray,
        invstd: np.ndarray,
        context: ActivationContext | None = None,
        /,
    ) -> tuple[np.ndarray, np.ndarray, Tensor]:
        sum_dz, products, dz = self.kernels.backward_reduce(
            dy, x, self._center(mean), invstd, _undone(context)
        )
        products = products / self.divisor / invstd
        if self.kept is not None:
            some = mean[self.chosen], invstd[self.chosen], chosen_context(context, self.chosen)
            found = self.kernels.backward_reduce(self._channels(dy), self.kept, *some)
            sum_dz[self.chosen], products[self.chosen], self.dz_kept = found
        return sum_dz, products, dz

    def backward_elementwise(
        self,
        dz: Tensor,
        x: Tensor,
        mean: np.ndarray,
        invstd: np.ndarray,
        weight: Tensor | None,
        mean_dy: np.ndarray,
        mean_dy_xmu: np.ndarray,
        context: ActivationContext | None = None,
        /,
    ) -> Tensor:
        scaled = mean_dy_xmu / self.divisor / invstd
        dx: Tensor = self.kernels.backward_elementwise(
            dz, x, self._center(mean), invstd, weight, mean_dy, scaled, _undone(context)
        )
        if self.kept is not None:
            dx[:, self._index()] = self.kernels.backward_elementwise(
                self.dz_kept,
                self.kept,
                mean[self.chosen],
                invstd[self.chosen],
                chosen_values(weight, self.chosen),
                mean_dy[self.chosen],
                mean_dy_xmu[self.chosen],
                chosen_context(context, self.chosen),
            )
        return dx

    def _center(self, mean: np.ndarray) -> np.ndarray:
        return np.zeros_like(mean) if self.bias is None else self.bias

    def _index(self) -> Tensor:
        return loaded_torch().from_numpy(self.chosen)

    def _channels(self, x: Tensor) -> Tensor:
        return x[:, self._index()]


def _undone(context: ActivationContext | None) -> ActivationContext | None:
    return None if context is None else UndoneContext(*context)


def _numpy(vector: Tensor) -> np.ndarray:
    found: np.ndarray = double(vector).clone().numpy()  # clone() resolves a set neg bit
    return found
