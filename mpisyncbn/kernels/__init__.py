"""The four verbs, one module of functions per place that data can live.

Every kernel module has exactly these names, for ``x`` of shape ``(N, C, *)``:

``local_moments(x) -> count, mean, m2``
    Number of values per channel (an int), their mean and the sum of their squared deviations
    from it, of this rank alone. An empty ``x`` gives zeros. For float64 input ``mean`` has two
    rows, a value near the mean and what is missing to it: their sum in one float64 would be
    too coarse to merge the ranks' variances where the mean is large.
``normalize(x, mean, invstd, weight, bias) -> y``
    ``(x - mean) * invstd * weight + bias``; ``weight`` and ``bias`` may be None.
``backward_reduce(dy, x, mean, invstd) -> sum_dy, sum_dy_xmu``
    Per channel, the sums of ``dy`` and ``dy * (x - mean)`` of this rank alone.
``backward_elementwise(dy, x, mean, invstd, weight, mean_dy, mean_dy_xmu) -> dx``
    ``(dy - mean_dy - (x - mean) * invstd**2 * mean_dy_xmu) * invstd * weight``.

``y`` and ``dx`` have the dtype and the memory format of ``x``. ``weight`` and ``bias`` are of
the same kind of array as ``x``. The other vectors are float64, of length C: NumPy arrays where
the data is in host memory, arrays on the data's device elsewhere.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import generic

__all__ = ["kernels_for"]

_cpu: ModuleType | None = None  # imported when the first torch tensor comes along


def kernels_for(x: Any) -> ModuleType:
    """The kernel module for the place where ``x`` lives."""
    global _cpu
    if not getattr(x, "is_cpu", False):  # of torch tensors in host memory alone
        return generic
    if _cpu is None:
        from . import cpu

        _cpu = cpu
    return _cpu
