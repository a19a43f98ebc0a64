"""The four kernels for torch tensors on a GPU, by Triton.

Vectors other than weight and bias are float64, on the device of ``x``. No function here waits for
the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from triton import JITFunction

from ..activation import NO_ACTIVATION, Activation, ActivationContext, recomputed_activation
from ..layout import dense, with_strides_of
from . import elementwise, moments, plans, running_stats, sums
from .plans import Plan

COMPILED = isinstance(moments.moments, JITFunction)  # else Triton's interpreter runs them

__all__ = ["backward_elementwise", "backward_reduce", "local_moments", "normalize", "record_batch"]


def local_moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    channels, is_float64 = x.shape[1], x.dtype == torch.float64
    found = _sums_of(x, 3 if is_float64 else 2)
    if x.numel():
        x, plan = _planned(x)
        partials = _partials_of(x, plan, 4)
        with _device_of(x):
            _launch(moments.moments, plan, x, partials, found, ONE=plan.one)
            if partials is not None:
                merge = plans.plan_merge(plan.shares, channels)
                _launch(moments.merge_moments, merge, partials, found, SPLIT_MEAN=is_float64)
    if is_float64:
        return x.numel() // channels, found[:2], found[2]
    mean, m2 = found.unbind()
    return x.numel() // channels, mean, m2


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: Activation = NO_ACTIVATION,
) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel():
        residual = None if residual is None else with_strides_of(x, residual)
        vectors = map(_vector, (mean, invstd, weight, bias))
        with _device_of(x):
            plan = _elements(x)
            others = residual, y, *vectors
            _launch(elementwise.normalize, plan, x, *others, **_constants(activation))
    return y


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, context: ActivationContext | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    found = _sums_of(x, 2)
    activation, weight, bias, y, residual = context or ActivationContext(NO_ACTIVATION, None, None)
    dz = dy
    if x.numel():
        x, plan = _planned(x)
        dy = dz = with_strides_of(x, dy)
        vectors = map(_vector, (mean, invstd, weight, bias))
        y, residual = (None if each is None else with_strides_of(x, each) for each in (y, residual))
        out = None
        if context is not None and context.stores_dz:
            out = dz = torch.empty_like(x)
        partials = _partials_of(x, plan, 2)
        with _device_of(x):
            others = x, y, residual, out, *vectors, partials, found
            _launch(sums.backward_sums, plan, dy, *others, **_constants(activation))
            if partials is not None:
                merge = plans.plan_merge(plan.shares, 2 * channels)
                _launch(sums.merge_sums, merge, partials, found)
    sum_dy, sum_dy_xmu = found.unbind()
    return sum_dy, sum_dy_xmu, dz


def backward_elementwise(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xmu: Tensor,
    context: ActivationContext | None = None,
) -> Tensor:
    x = dense(x)
    dx = torch.empty_like(x)
    activation, bias = recomputed_activation(context)
    if x.numel():
        vectors = map(_vector, (mean, invstd, weight, bias, mean_dy, mean_dy_xmu))
        with _device_of(x):
            plan = _elements(x)
            dz, others = with_strides_of(x, dz), (x, dx, *vectors)
            _launch(elementwise.backward_elementwise, plan, dz, *others, **_constants(activation))
    return dx


def record_batch(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    to_unbiased: float,
    momentum: float,
) -> bool:
    """Move running statistics towards those of a batch, and count the batch.

    The variance of the batch is ``var * to_unbiased``. Returns False, and changes nothing, for
    tensors that only torch's own operations can write to, or should refuse.
    """
    written = [each for each in (running_mean, running_var, num_batches_tracked) if each is not None]
    if torch._C._are_functorch_transforms_active() or not all(_plain(each, mean) for each in written):
        return False
    torch._C._increment_version(written)  # every operation in place tells autograd so
    plan = plans.plan_running_stats(mean.shape[0], to_unbiased, momentum)
    with _device_of(mean):
        others = running_var, num_batches_tracked, mean, var
        _launch(running_stats.record_batch, plan, running_mean, *others)
    return True


def _plain(each: Tensor, mean: Tensor) -> bool:
    in_place = type(each) is Tensor and each.device == mean.device
    return in_place and each.is_contiguous() and not each.requires_grad and not each.is_inference()


def try_out(device: torch.device) -> None:
    """Raise if Triton cannot start a kernel: it needs a C compiler and a driver for its code."""
    ones = torch.ones((1, 1), dtype=torch.float64, device=device)
    plan = plans.plan_merge(1, 1)
    with _device_of(ones):
        for _ in range(2):  # the first start compiles; the second one is by what is kept in the plan
            _launch(sums.merge_sums, plan, ones, torch.empty_like(ones))


def _launch(
    kernel: JITFunction, plan: Plan, first: Tensor, *others: Tensor | None, **constants: float
) -> None:
    """Start a kernel on the current stream.

    Triton inspects every argument at each call, which takes the host longer than the start itself.
    So this keeps compiled kernels with the plan, whose sizes stay the same, by dtype and alignment
    of the tensors.
    """
    tensors = first, *others
    specialization = [None if each is None else (each.dtype, each.data_ptr() % 16) for each in tensors]
    key = (id(kernel), first.device, *constants.values(), *specialization)
    launch = plan.launches.get(key)
    if launch is not None:
        run, more = launch
        run(*tensors, *more)
        return
    options = plan.options | constants
    compiled = kernel[plan.grid](*tensors, *plan.sizes, **options)
    if compiled is not None:  # Triton's interpreter compiles nothing
        last = kernel.params[len(tensors) + len(plan.sizes) :]
        plan.launches[key] = compiled[plan.grid], (*plan.sizes, *(options[each.name] for each in last))


def _constants(activation: Activation) -> dict[str, float]:
    return {"KIND": int(activation.kind), "PARAMETER": activation.parameter}


def _sums_of(x: Tensor, rows: int) -> Tensor:
    """Memory for sums over ``x``: zeros if it is empty."""
    make = x.new_empty if x.numel() else x.new_zeros
    return make((rows, x.shape[1]), dtype=torch.float64)


def _partials_of(x: Tensor, plan: Plan, rows: int) -> Tensor | None:
    """Memory for the partial results of programs; None if one program computes the whole sum."""
    return x.new_empty((rows, x.shape[1], plan.shares), dtype=torch.float64) if plan.shares > 1 else None


def _planned(x: Tensor) -> tuple[Tensor, Plan]:
    x = dense(x)
    return x, plans.plan_sums(*_matrix(x), x.dtype, _multiprocessors(x.device))


def _elements(x: Tensor) -> Plan:
    return plans.plan_elementwise(*_matrix(x), x.dtype, _multiprocessors(x.device))


def _vector(values: Tensor | None) -> Tensor | None:
    """A vector as the kernels read it: contiguous, and with its neg bit resolved."""
    return values if values is None else values.resolve_neg().contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels, and how many values of a channel lie side by side: 1 if channels do."""
    samples, channels = x.shape[:2]
    if x.is_contiguous():
        return samples, channels, x.numel() // (samples * channels)
    return x.numel() // channels, channels, 1


def _multiprocessors(device: torch.device) -> int:
    return _count(device.index) if device.type == "cuda" else 4  # Triton's interpreter


@lru_cache(maxsize=64)
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """A context in which the device of ``x`` is current: Triton starts kernels there."""
    if x.is_cuda and torch.cuda.current_device() != x.device.index:
        return torch.cuda.device(x.device)
    return nullcontext()
