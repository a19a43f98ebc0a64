"""Kernels: one module of functions for each place that data can live.

Each module has the four functions of ``protocol.Kernels``. ``cuda`` has one more, ``record_batch``,
for running statistics.

=================  =============================================================================
module             for
=================  =============================================================================
``cpu``            NumPy and torch in host memory: native code
``aten``           torch in host memory, if the native code was not built
``cuda``           torch on a GPU: Triton
``aten_cuda``      torch on a GPU, if Triton is not installed
``dlpack``         CuPy, if torch is installed: by ``cuda`` or ``aten_cuda``
``generic``        everything else, and derivatives of derivatives
``masked``         everything with a mask that ``cpu`` does not serve
=================  =============================================================================

``from_output`` makes backward kernels that read a layer's output in place of its input, over any
module for host memory.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, cast

import numpy as np

from . import generic, masked
from .activation import NO_ACTIVATION, Activation, ActivationContext, Kind
from .generic import has_float64
from .masked import where_true
from .protocol import Array, BackwardKernels, Kernels, NativeKernels

if TYPE_CHECKING:
    from torch import device as Device

__all__ = [
    "NO_ACTIVATION",
    "Activation",
    "ActivationContext",
    "Array",
    "BackwardKernels",
    "Kernels",
    "Kind",
    "compiled_programs",
    "cuda_kernels_for",
    "describe",
    "has_float64",
    "kernels_for",
    "loaded_torch",
    "native",
    "where_true",
]


def kernels_for(x: Array, mask: Array | None = None) -> Kernels:
    """The kernels for the place where ``x`` lives, with a mask if there is one."""
    if mask is not None:
        unmasked = kernels_for(x)
        return masked.with_mask(unmasked if unmasked is native() else masked, mask)
    if getattr(x, "is_cpu", False):  # true only of torch tensors in host memory
        kernels = native()
        return kernels if kernels and x.ndim <= kernels.most_dimensions else _aten()
    if type(x) in (np.ndarray, np.memmap) and x.dtype.isnative and x.dtype.char in "efd":
        return native() or generic
    if getattr(x, "is_cuda", False):
        return cuda_kernels_for(x.device)[0]
    if hasattr(x, "__cuda_array_interface__"):  # CuPy: torch's tensors on a GPU have returned above
        return _dlpack() or generic
    return generic


def loaded_torch() -> ModuleType:
    """torch, without the cost of an import statement; None before anything has imported it."""
    return sys.modules.get("torch")  # type: ignore[return-value]  # callers hold a tensor, or ask for None


@cache
def native() -> NativeKernels | None:
    """The native kernels for host memory; None if they were not built."""
    try:
        from . import cpu
    except ImportError:
        return None
    return cast("NativeKernels", cpu)


@cache
def _aten() -> Kernels:
    from . import aten  # needs torch

    return aten


@cache
def cuda_kernels_for(device: Device) -> tuple[Kernels, str]:
    """The kernels for torch tensors on a GPU, and words for reports that say how they are made.

    Warns if Triton does not work there.
    """
    torch = loaded_torch()
    try:
        from . import cuda

        cuda.try_out(device)
    except ModuleNotFoundError:
        why = "Triton is not installed: pip install triton"
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # Triton is not to blame
    except Exception as error:  # compilers and drivers fail in many ways
        why = f"Triton does not work here: {type(error).__name__}: {error}"
    else:
        return cuda, "Triton"
    from . import aten_cuda

    kernels = f"composed of torch's operations for batch norm, because {why}"
    warnings.warn(f"the kernels for {device} are {kernels}", RuntimeWarning, stacklevel=2)
    return aten_cuda, kernels


def compiled_programs(x: Array) -> ModuleType | None:
    """The module of compiled programs for a torch tensor on a GPU; None if Triton compiles none."""
    return _programs(x.device) if getattr(x, "is_cuda", False) else None


@cache
def _programs(device: Device) -> ModuleType | None:
    kernels, _ = cuda_kernels_for(device)
    if not getattr(kernels, "COMPILED", False) or native() is None:
        return None
    from .cuda import programs

    return programs


def describe(*tensors: Array | None) -> Hashable | None:
    """A key of all that kernels and checks depend on in torch tensors, except addresses and values.

    Whether a tensor requires a gradient, or is one of inference mode, is not in it. None if a
    tensor has no memory of its own, such as a sparse one.
    """
    return _describer()(*tensors)


@cache
def _describer() -> Callable[..., Hashable | None]:
    native_code = native()
    has_functions = native_code is not None and native_code.use_tensors(loaded_torch().Tensor)
    return native_code.describe if native_code is not None and has_functions else _describe_in_python


def _describe_in_python(*tensors: Array | None) -> Hashable | None:
    try:
        if any(t is not None and t.numel() and not t.data_ptr() for t in tensors):
            return None
        return tuple(
            None
            if t is None
            else (type(t), t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16, t.is_neg())
            for t in tensors
        )
    except (AttributeError, NotImplementedError, RuntimeError):  # a nested tensor has no shape
        return None


@cache
def _dlpack() -> Kernels | None:
    try:
        import torch

        usable = torch.cuda.is_available()
    except ImportError:
        return None
    if not usable:
        return None
    from . import dlpack

    return dlpack
