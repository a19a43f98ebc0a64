"""Checks of the statistics of a batch. Native code trusts their lengths and dtypes."""

from __future__ import annotations

import numpy as np

from ..batch_stats import BatchStats
from ..comm import transport
from ..errors import on_rank
from ..kernels import Array
from .arrays import COUNTING, check_kind, dtype_name, on_device

__all__ = ["check_stats"]


def check_stats(stats: object, names: tuple[str, ...], channels: int, like: Array) -> None:
    """Check the vectors ``names`` of a BatchStats, and its count."""
    if not isinstance(stats, BatchStats):
        raise TypeError(
            "expected stats to be the BatchStats that batch_norm_forward returned, got "
            f"{type(stats).__name__}{on_rank()}"
        )
    first = getattr(stats, names[0])
    if not transport.on_host(first):
        check_kind(f"stats.{names[0]}", first, "the other arguments", like)
    for name in names:
        vector = getattr(stats, name)
        check_kind(f"stats.{name}", vector, f"stats.{names[0]}", first)
        if tuple(vector.shape) != (channels,):
            raise ValueError(
                f"expected stats.{name} of {channels} channels, got shape {tuple(vector.shape)}{on_rank()}: "
                "pass those of this input"
            )
        if dtype_name(vector.dtype) not in ("float32", "float64") or on_device(vector) != on_device(first):
            raise TypeError(
                f"expected stats.{name} of dtype float64{on_device(first)}, got {dtype_name(vector.dtype)}"
                f"{on_device(vector)}{on_rank()}: pass them as they were returned"
            )
    _check_count_of(stats, names[0])


def _check_count_of(stats: BatchStats, name: str) -> None:
    """Check the count of a BatchStats: a whole number or, like the vector ``name``, a 0-d array."""
    count = stats.count
    if not isinstance(count, (int, np.integer)):
        if getattr(count, "ndim", None) != 0 or isinstance(count, np.generic):
            raise TypeError(
                f"expected stats.count to be a whole number, got {type(count).__name__}{on_rank()}"
            )
        check_kind("stats.count", count, f"stats.{name}", getattr(stats, name))
        if dtype_name(count.dtype) not in COUNTING:
            raise TypeError(f"expected stats.count to be a whole number, got {count.dtype}{on_rank()}")
    elif count < 0:
        raise ValueError(f"expected stats.count to be at least 0, got {count}{on_rank()}")
