"""The functions that every module of kernels has.

``x`` is of shape ``(N, C, *)``; ``y`` and ``dx`` have its dtype and memory format. ``weight`` and
``bias`` are the same kind of array as ``x``, or None. The other vectors are float64, of length C:
NumPy arrays if the data is in host memory, else arrays on the data's device (float32 if that has no
float64).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np

    from .activation import Activation, ActivationContext
    from .cpu import _cpu

__all__ = ["Array", "BackwardKernels", "Kernels", "NativeKernels", "Running", "Vector"]

Array: TypeAlias = Any  # of NumPy, CuPy or torch, on any device
Vector: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


class BackwardKernels(Protocol):
    """The two kernels of the backward pass."""

    def backward_reduce(
        self, dy: Array, x: Array, mean: Array, invstd: Array, context: ActivationContext | None = ..., /
    ) -> tuple[Array, Array, Array]:
        """The sums per channel of ``dz`` and ``dz * (x - mean)`` on this rank, and ``dz``.

        ``dz`` is ``dy`` or, with a context, the gradient of the activation's input. A module may
        compute that a second time in ``backward_elementwise``: then it returns ``dy`` for ``dz``.
        """
        ...

    def backward_elementwise(
        self,
        dz: Array,
        x: Array,
        mean: Array,
        invstd: Array,
        weight: Array | None,
        mean_dy: Array,
        mean_dy_xmu: Array,
        context: ActivationContext | None = ...,
        /,
    ) -> Array:
        """``dx = (dz - mean_dy - (x - mean) * invstd**2 * mean_dy_xmu) * invstd * weight``.

        ``dz`` is what ``backward_reduce`` returned, and ``context`` what it was given.
        """
        ...


class Kernels(BackwardKernels, Protocol):
    """The four kernels for one kind of array."""

    def local_moments(self, x: Array, /) -> tuple[int, Array, Array]:
        """The number of values per channel on this rank, their mean, and M2.

        M2 is the sum of squared deviations from the mean. An empty ``x`` gives zeros. For a float64
        ``x`` the mean is of shape ``(2, C)``, in two parts: if a mean is large, one float64 is too
        coarse to merge the ranks' variances.
        """
        ...

    def normalize(
        self,
        x: Array,
        mean: Array,
        invstd: Array,
        weight: Array | None,
        bias: Array | None,
        residual: Array | None = ...,
        activation: Activation = ...,
        /,
    ) -> Array:
        """The activation of ``(x - mean) * invstd * weight + bias + residual``.

        ``residual`` is of the shape of ``x``, or None.
        """
        ...


class Running(NamedTuple):
    """Running statistics, tensors on a GPU, that the kernels of a forward pass update."""

    mean: Array
    var: Array
    num_batches_tracked: Array | None
    momentum: float


class NativeKernels(Kernels):
    """``kernels.cpu``: the four kernels, and the other native functions. See ``_cpu.pyi``."""

    if TYPE_CHECKING:  # the stub has the signatures
        Call = _cpu.Call
        Launches = _cpu.Launches
        Link = _cpu.Link
        StreamWorker = _cpu.StreamWorker
        Total = _cpu.Total
        most_dimensions: int
        add_departing_group = staticmethod(_cpu.add_departing_group)
        describe = staticmethod(_cpu.describe)
        install_finalize_hook = staticmethod(_cpu.install_finalize_hook)
        instruction_set = staticmethod(_cpu.instruction_set)
        invstd = staticmethod(_cpu.invstd)
        passes_fast_check = staticmethod(_cpu.passes_fast_check)
        threads = staticmethod(_cpu.threads)
        update_running_stats = staticmethod(_cpu.update_running_stats)
        use_tensors = staticmethod(_cpu.use_tensors)
