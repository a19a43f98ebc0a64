"""The four verbs, one module of functions per place that data can live.

Every kernel module has these names, for ``x`` of shape ``(N, C, *)``; ``cuda`` has one more, ``enter_batch``,
for running statistics:

``local_moments(x) -> count, mean, m2``
    Number of values per channel (an int), their mean and the sum of their squared deviations
    from it, of this rank alone. An empty ``x`` gives zeros. For float64 input ``mean`` has two
    rows, a value near the mean and what is missing to it: their sum in one float64 would be
    too coarse to merge the ranks' variances where the mean is large.
``normalize(x, mean, invstd, weight, bias, residual=None, relu=False) -> y``
    ``(x - mean) * invstd * weight + bias``; ``weight`` and ``bias`` may be None. On request with
    ``residual``, of the shape of ``x``, added to it, and max(., 0) of all that.
``backward_reduce(dy, x, mean, invstd, gate=None) -> sum_dy, sum_dy_xmu, dz``
    Per channel, the sums of ``dy`` and ``dy * (x - mean)`` of this rank alone. With a Gate, of the
    gradient before the ReLU: of ``dy`` where the output is positive, and 0 elsewhere. ``dz`` is
    that gradient; or still ``dy``, where the module prefers to compute it a second time.
``backward_elementwise(dz, x, mean, invstd, weight, mean_dy, mean_dy_xmu, gate=None) -> dx``
    ``(dz - mean_dy - (x - mean) * invstd**2 * mean_dy_xmu) * invstd * weight``, for the ``dz`` and
    the ``gate`` of ``backward_reduce``.

``y`` and ``dx`` have the dtype and the memory format of ``x``. ``weight`` and ``bias`` are of
the same kind of array as ``x``. The other vectors are float64, of length C: NumPy arrays where
the data is in host memory, arrays on the data's device elsewhere. (Where a device has no float64
they are float32.)

=================  =============================================================================
module             serves
=================  =============================================================================
``cpu``            NumPy and torch in host memory: native code
``aten``           torch in host memory, where the native code was not built
``cuda``           torch on a GPU: Triton
``aten_cuda``      torch on a GPU, where Triton is not installed
``dlpack``         CuPy, where torch is installed: ``cuda`` or ``aten_cuda``
``generic``        everything else, and derivatives of derivatives
=================  =============================================================================
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import generic
from .generic import has_float64

__all__ = ["Gate", "has_float64", "kernels_for", "loaded_torch", "native", "on_cuda"]


class Gate(NamedTuple):
    """What tells where the output of a layer that ends in ReLU was positive."""

    weight: Any
    bias: Any
    y: Any  # the output itself where a residual was added; None: computed again from x


def kernels_for(x: Any) -> ModuleType:
    """The kernel module for the place where ``x`` lives."""
    if getattr(x, "is_cpu", False):  # of torch tensors in host memory alone
        kernels: Any = native()
        return kernels if kernels and x.ndim <= kernels.most_dimensions else _aten()
    if type(x) in (np.ndarray, np.memmap) and x.dtype.isnative and x.dtype.char in "efd":
        return native() or generic
    if getattr(x, "is_cuda", False):
        return on_cuda(x.device)[0]
    if hasattr(x, "__cuda_array_interface__"):  # CuPy; torch's tensors on a GPU are gone by here
        return _dlpack() or generic
    return generic


def loaded_torch() -> Any:
    """torch, without the cost of an import statement: whoever has a tensor has imported it."""
    return sys.modules.get("torch")


@cache
def native() -> ModuleType | None:
    """The native kernels for host memory; None where they were not built."""
    try:
        from . import cpu
    except ImportError:
        return None
    return cpu


@cache
def _aten() -> ModuleType:
    from . import aten  # needs torch

    return aten


@cache
def on_cuda(device: Any) -> tuple[ModuleType, str]:
    """The kernels for torch tensors on a GPU, and what they are made of."""
    torch = loaded_torch()
    try:
        from . import cuda

        cuda.try_out(device)
    except ImportError:
        why = "Triton is not installed: pip install triton"
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # not of Triton's making
    except Exception as error:  # of many kinds
        why = f"Triton does not work here: {type(error).__name__}: {error}"
    else:
        return cuda, "Triton"
    from . import aten_cuda

    kernels = f"composed of torch's operations for batch norm, because {why}"
    warnings.warn(f"the kernels for {device} are {kernels}", RuntimeWarning, stacklevel=2)
    return aten_cuda, kernels


@cache
def _dlpack() -> ModuleType | None:
    try:
        import torch

        usable = torch.cuda.is_available()
    except ImportError:
        return None
    if not usable:
        return None
    from . import dlpack

    return dlpack
