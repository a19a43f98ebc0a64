"""The arithmetic of an exchange: from the moments of ranks to those of their group."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from .kernels import Array

__all__ = [
    "Moments",
    "cancelled_channels",
    "is_absorbed",
    "merge_two",
    "moments_of_rows",
    "moments_of_sums",
    "without_rounding",
]

Moments: TypeAlias = tuple[int, np.ndarray, np.ndarray]  # count, mean and variance of a group

# A variance below _CANCELLATION * mean**2 has lost digits in the sums. If there is no variance,
# rounding leaves up to _ROUNDING * mean**2.
_CANCELLATION, _ROUNDING = 1e-8, 1e-15


def is_absorbed(m2: Array, squares: Array) -> bool:
    """Whether an M2 of this rank vanishes in its sum of squares, in some channel.

    For arrays on a device the answer is no: finding out would take longer than the whole message.
    """
    if type(m2) is not np.ndarray:
        return False
    is_small = m2 < _CANCELLATION * squares
    return bool(np.count_nonzero(is_small) and m2[is_small].any())


def moments_of_sums(totals: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, bool]:
    """Count, mean and variance of the group, and whether some variance has lost digits."""
    total, channels = int(totals[2]), len(totals) // 2 - 1
    means = totals[3:] / max(total, 1)
    mean, var = means[:channels], means[channels:]
    square = mean * mean
    var -= square
    return total, mean, var, bool(np.count_nonzero(var < _CANCELLATION * square))


def cancelled_channels(mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """The channels whose variance has lost digits, and the numbers to take their sums about.

    Returns:
        A boolean vector that is True in these channels; a vector of origins, 0 in all others;
        whether all of these channels may be constant. A channel may be constant if only rounding is
        left of its variance, and its mean is a float32 number, as few other means are. Its sums
        about that number are exactly 0.
    """
    square = mean * mean
    cancelled = var < _CANCELLATION * square
    rounded = mean.astype(np.float32).astype(float)
    is_rounding = abs(var) <= _ROUNDING * square
    constant = is_rounding & (abs(mean - rounded) <= _ROUNDING * abs(mean))
    return cancelled, np.where(cancelled, rounded, 0.0), bool(constant[cancelled].all())


def without_rounding(var: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """``var``, but 0 for channels with one mean on all ranks, at a ``distance`` from the origin.

    Only rounding, of either sign, is left of their variance. NaN stays NaN.
    """
    return var * (var > _ROUNDING * (distance * distance))


def merge_two(a: Moments, b: Moments) -> Moments:
    """The moments of two batches together, by Chan, Golub and LeVeque 1979, eq. 2.1."""
    count = a[0] + b[0]
    share = b[0] / max(count, 1)
    distance = b[1] - a[1]
    mean = a[1] + distance * share
    var = a[2] * (1 - share) + b[2] * share + distance * distance * (share * (1 - share))
    return count, mean, var


def moments_of_rows(messages: np.ndarray) -> Moments:
    """Count, mean and variance of the group from a row for each rank: fingerprint, count, mean, M2.

    The mean of a rank is in two rows, whose sum it is.
    """
    gathered = messages[:, 2:]
    counts = gathered[:, :1]
    means_hi, means_lo, m2s = np.split(gathered[:, 1:], 3, axis=1)
    total = int(counts.sum())
    # Means as distances from that of the first rank with data: small numbers, which keep their
    # digits. An empty rank's row is zeros, and its weight of 0 keeps it out of all sums.
    origin = means_hi[np.argmax(counts > 0)]
    distances = (means_hi - origin) + means_lo
    mean = (counts * distances).sum(axis=0) / max(total, 1)
    var = (m2s + counts * (distances - mean) ** 2).sum(axis=0) / max(total, 1)
    return total, origin + mean, var
