"""The statistics of a batch, which forward hands to backward and to the running statistics."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

from .kernels import Array, native

__all__ = ["NOT_TO_RECORD", "BatchStats", "invstd_of"]


class BatchStats(NamedTuple):
    """Statistics of the whole group's batch, the same on every rank.

    Vectors are of length C, float64, or float32 on a device without float64.
    """

    #: The mean of each channel.
    mean: Array
    #: The biased variance, which is divided by ``count``.
    var: Array
    #: ``(var + eps) ** -0.5``
    invstd: Array
    #: The number of values per channel, an int; in a compiled graph or under stream, an array.
    count: Array


NOT_TO_RECORD = BatchStats(None, None, None, 0)  # for a batch that is recorded already, or never


def invstd_of(var: Array, eps: float) -> Array:
    """``(var + eps) ** -0.5``; 0 for a constant channel where ``eps`` is 0."""
    if type(var) is np.ndarray and eps > 0 and (native_cpu := native()) is not None:
        invstd = np.empty(len(var))
        native_cpu.invstd(var, eps, invstd)
        return invstd
    if eps == 0:
        # A constant channel gives 0, so that y is its bias and dx is 0, not NaN. A variance below
        # float64's normal numbers gives 0 too.
        constant = var < sys.float_info.min
        return (var + constant) ** -0.5 * ~constant
    return (var + eps) ** -0.5
