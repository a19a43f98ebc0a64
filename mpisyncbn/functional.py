"""Synchronized batch normalization, the whole algorithm, for any array. Read this first.

A training step of one layer has two halves. ``forward``: the moments of this rank, one exchange,
normalize. ``backward``: the sums of this rank, one exchange, dx. The kernels work where the data
lives (kernels/). An exchange is the one message each way (exchange.py). Formulas:
docs/explanation/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import numpy as np

from . import exchange, profiling
from .arguments import check_arguments, check_count, check_gradient, check_mask, check_stats
from .batch_stats import BatchStats, invstd_of
from .comm import transport
from .comm.groups import AnyGroup, resolve
from .fingerprint import LayerCall, layer_dtype
from .kernels import (
    NO_ACTIVATION,
    Activation,
    ActivationContext,
    Array,
    BackwardKernels,
    Kernels,
    kernels_for,
)
from .running_stats import update_running_stats

__all__ = ["BatchStats", "batch_norm_backward", "batch_norm_forward", "update_running_stats"]

# The two exchanges. MergeMoments: count, mean and M2 of this rank -> count, mean and variance of
# the group. ReduceSums: sums of this rank -> sums of the group.
MergeMoments: TypeAlias = Callable[[int, Array, Array], tuple[int, Array, Array]]
ReduceSums: TypeAlias = Callable[[Array, Array], Sequence[Array]]


def forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    kernels: Kernels,
    merge_moments: MergeMoments,
    residual: Array | None = None,
    activation: Activation = NO_ACTIVATION,
) -> tuple[Array, BatchStats, BatchStats]:
    """Normalize ``x`` with the statistics of the group's batch. The caller checks arguments.

    ``activations.activation_of`` makes ``activation`` of a text or module.

    Returns:
        ``y``; the statistics in host memory, or on the device under the stream transport; the same
        statistics on the device of ``x``.

    Collective: every rank of the group must call.
    """
    count, mean, m2 = kernels.local_moments(x)
    count, mean, var = merge_moments(count, mean, m2)
    stats = BatchStats(mean, var, invstd_of(var, eps), count)
    device_stats = stats
    if not transport.on_host(x):
        device_stats = BatchStats._make((*transport.to_device_of(x, *stats[:3]), count))
    mean, _, invstd, _ = device_stats
    return kernels.normalize(x, mean, invstd, weight, bias, residual, activation), stats, device_stats


def backward(
    dy: Array,
    x: Array,
    device_stats: BatchStats,
    weight: Array | None,
    kernels: BackwardKernels,
    reduce_sums: ReduceSums,
    need_dx: bool = True,
    context: ActivationContext | None = None,
) -> tuple[Array, Array, Array, Array]:
    """The gradients of ``forward``, from the gradient ``dy`` of its ``y``.

    Returns:
        ``dx``, None unless ``need_dx``; the gradients of weight and bias, which are sums of this
        rank alone; the gradient of the residual.

    Collective if ``need_dx``: every rank of the group must call.
    """
    mean, _, invstd, count = device_stats
    sum_dy, sum_dy_xmu, dz = kernels.backward_reduce(dy, x, mean, invstd, context)
    dx = None
    if need_dx:
        total_dy, total_dy_xmu = reduce_sums(sum_dy, sum_dy_xmu)
        if isinstance(total_dy, np.ndarray) and not isinstance(count, int):
            count = float(count)  # on the device, of a forward pass that the host did not wait for
        count = count + (count == 0)  # if no rank has a value, all sums are 0
        mean_dy, mean_dy_xmu = transport.to_device_of(x, total_dy / count, total_dy_xmu / count)
        dx = kernels.backward_elementwise(dz, x, mean, invstd, weight, mean_dy, mean_dy_xmu, context)
    return dx, sum_dy_xmu * invstd, sum_dy, dz


def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    process_group: AnyGroup = None,
    mask: Array | None = None,
) -> tuple[Array, BatchStats]:
    """Normalize ``x`` with mean and variance of the group's batch (Ioffe and Szegedy 2015).

    Args:
        x: ``(N, C, *)``, float32, float64, float16 or (torch alone) bfloat16: an array of NumPy or
            CuPy, or a tensor. N may differ between ranks, and be 0.
        weight, bias: of length C, of the dtype of ``x``, or float32 for half precision; or None.
        eps: added to the variance, at least 0.
        process_group: the ranks to normalize over: an mpi4py communicator, a Communicator, a
            process group of torch.distributed, or None for the world.
        mask: boolean, of the shape of ``x`` but with one channel: ``(N, 1, *)``; or None.
            Statistics are those of the values where it is true. Elsewhere ``y`` is 0
            (docs/guides/masks.md).

    Returns:
        ``y``, like ``x``, and the BatchStats that ``batch_norm_backward`` needs, as arrays of the
        same kind. autograd does not record this; ``sync_batch_norm`` is for that.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype or device.
        TypeError: an argument is a masked array, a matrix, or an array of another library.
        ValueError: on every rank, if the group has a single value per channel.
        CollectiveMismatchError: on every rank, if the ranks were in different calls.
        MPISyncBNError: the group is the world, and torch.distributed or a launcher has more ranks.

    Collective: every rank of the group must call.
    """
    check_arguments(x, weight, bias, eps=eps)
    check_mask(mask, x)
    group, call = resolve(process_group), _layer_call(x, weight, bias, "forward", float(eps))
    merge_moments = partial(exchange.merge_moments, group, call)
    with _no_grad_or_warnings(x):
        y, stats, device_stats = forward(x, weight, bias, eps, kernels_for(x, mask), merge_moments)
        check_count(stats.count, x)
        if transport.on_host(x):
            vectors = (transport.from_host(vector, x) for vector in stats[:3])
            device_stats = BatchStats._make((*vectors, stats.count))
    return y, device_stats


def batch_norm_backward(
    dy: Array,
    x: Array,
    stats: BatchStats,
    weight: Array | None = None,
    *,
    process_group: AnyGroup = None,
    mask: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The gradients of ``batch_norm_forward``.

    Args:
        dy: gradient of the loss with respect to ``y``, of the shape, dtype and device of ``x``.
        x, weight, process_group, mask: as given to ``batch_norm_forward``.
        stats: what it returned.

    Returns:
        ``dx``, like ``x``, and 0 where the mask is false; ``dweight`` and ``dbias``, of length C,
        the sums of this rank alone. Data-parallel training averages them with all other gradients.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype or device.
        CollectiveMismatchError: on every rank, if the ranks were in different calls.

    Collective: every rank of the group must call.
    """
    check_arguments(x, weight, None)
    check_gradient(dy, x)
    check_mask(mask, x)
    check_stats(stats, ("mean", "var", "invstd"), x.shape[1], x)
    group, call = resolve(process_group), _layer_call(x, weight, None, "backward")
    reduce_sums = partial(exchange.reduce_sums, group, call)
    with _no_grad_or_warnings(x):
        vectors = transport.to_host(*stats[:3]) if transport.on_host(x) else stats[:3]
        device_stats = BatchStats._make((*vectors, stats.count))
        kernels = kernels_for(x, mask)
        dx, dweight, dbias, _ = backward(dy, x, device_stats, weight, kernels, reduce_sums)
        if transport.on_host(x):
            dweight, dbias = transport.from_host(dweight, x), transport.from_host(dbias, x)
    return dx, dweight, dbias


def _layer_call(
    x: Array, weight: Array | None, bias: Array | None, direction: str, eps: float | None = None
) -> LayerCall:
    profiling.find_torch()  # torch may have been imported since
    return LayerCall("functional.batch_norm", direction, x.shape[1], layer_dtype(x, weight, bias), eps)


@contextmanager
def _no_grad_or_warnings(x: Array) -> Iterator[None]:
    """Turn off autograd, and NumPy's warnings of values that are not finite: they are data."""
    if hasattr(x, "detach"):
        import torch

        with torch.no_grad(), np.errstate(all="ignore"):
            yield
    else:
        with np.errstate(all="ignore"):
            yield
