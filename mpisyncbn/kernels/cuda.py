"""The four verbs for torch tensors on a GPU, by the Triton kernels of cuda_loops.py.

The other vectors come and go in float64, on the device of ``x``. Nothing here waits for the device.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import cuda_loops, cuda_plans
from .cuda_plans import Plan
from .layout import dense, like

__all__ = ["backward_elementwise", "backward_reduce", "enter_batch", "local_moments", "normalize"]


def local_moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    channels, exact = x.shape[1], x.dtype == torch.float64
    found = _sums_of(x, 3 if exact else 2)
    if x.numel():
        x, plan = _planned(x)
        parts = _parts_of(x, plan, 4)
        with _device_of(x):
            _start(cuda_loops.moments, plan, x, parts, found, ONE=plan.one)
            if parts is not None:
                merging = cuda_plans.merging(plan.shares, channels)
                _start(cuda_loops.merge_moments, merging, parts, found, SPLIT_MEAN=exact)
    if exact:
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
    relu: bool = False,
) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel():
        residual = None if residual is None else like(residual, x)
        vectors = map(_vector, (mean, invstd, weight, bias))
        with _device_of(x):
            _start(cuda_loops.normalize, _elements(x), x, residual, y, *vectors, RELU=relu)
    return y


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, gate: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    found = _sums_of(x, 2)
    weight, bias, y = gate or (None, None, None)
    dz = dy
    if x.numel():
        x, plan = _planned(x)
        dy = dz = like(dy, x)
        vectors = map(_vector, (mean, invstd, weight, bias))
        out = None
        if y is not None:
            y, dz = like(y, x), torch.empty_like(x)
            out = dz
        parts = _parts_of(x, plan, 2)
        with _device_of(x):
            _start(
                cuda_loops.backward_sums, plan, dy, x, y, out, *vectors, parts, found, GATE=gate is not None
            )
            if parts is not None:
                _start(cuda_loops.merge_sums, cuda_plans.merging(plan.shares, 2 * channels), parts, found)
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
    gate: Any = None,
) -> Tensor:
    x = dense(x)
    dx = torch.empty_like(x)
    relu = gate is not None and gate.y is None
    if x.numel():
        vectors = map(_vector, (mean, invstd, weight, gate.bias if relu else None, mean_dy, mean_dy_xmu))
        with _device_of(x):
            _start(cuda_loops.backward_elementwise, _elements(x), like(dz, x), x, dx, *vectors, GATE=relu)
    return dx


def enter_batch(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    to_unbiased: float,
    momentum: float,
) -> bool:
    """Move the running statistics to those of a batch, of variance ``var * to_unbiased``; and one more batch.

    Returns False for tensors that only torch's own operations know how to write to, or have to refuse.
    """
    written = [each for each in (running_mean, running_var, batches) if each is not None]
    if torch._C._are_functorch_transforms_active() or not all(_plain(each, mean) for each in written):
        return False
    torch._C._increment_version(written)  # as every operation in place tells autograd
    plan = cuda_plans.entering(mean.shape[0], to_unbiased, momentum)
    with _device_of(mean):
        _start(cuda_loops.enter_batch, plan, running_mean, running_var, batches, mean, var)
    return True


def _plain(each: Tensor, mean: Tensor) -> bool:
    in_place = type(each) is Tensor and each.device == mean.device
    return in_place and each.is_contiguous() and not each.requires_grad and not each.is_inference()


def try_out(device: torch.device) -> None:
    """Raises where Triton cannot start a kernel: it needs a C compiler, and a driver that knows its code."""
    ones = torch.ones((1, 1), dtype=torch.float64, device=device)
    with _device_of(ones):
        _start(cuda_loops.merge_sums, cuda_plans.merging(1, 1), ones, torch.empty_like(ones))


def _start(kernel: Any, plan: Plan, first: Tensor, *others: Tensor | None, **constants: Any) -> None:
    """Start a kernel on the current stream.

    Triton looks at every argument anew at each call, which takes the host longer than the start itself. The
    sizes of a plan are the same each time; of tensors it is their dtype and alignment that matters.
    """
    tensors = first, *others
    seen = [None if each is None else (each.dtype, each.data_ptr() % 16) for each in tensors]
    key = (id(kernel), first.device, *constants.values(), *seen)
    known = plan.started.get(key)
    if known is not None:
        again, rest = known
        again(*tensors, *rest)
        return
    options = plan.options | constants
    compiled = kernel[plan.grid](*tensors, *plan.sizes, **options)
    if compiled is not None:  # there is nothing to keep in Triton's interpreter
        last = kernel.params[len(tensors) + len(plan.sizes) :]
        plan.started[key] = compiled[plan.grid], (*plan.sizes, *(options[each.name] for each in last))


def _sums_of(x: Tensor, rows: int) -> Tensor:
    """Memory for sums over ``x``: zeros where it is empty."""
    make = x.new_empty if x.numel() else x.new_zeros
    return make((rows, x.shape[1]), dtype=torch.float64)


def _parts_of(x: Tensor, plan: Plan, rows: int) -> Tensor | None:
    """Memory for what each program finds; None where one finds all."""
    return x.new_empty((plan.shares, rows, x.shape[1]), dtype=torch.float64) if plan.shares > 1 else None


def _planned(x: Tensor) -> tuple[Tensor, Plan]:
    x = dense(x)
    return x, cuda_plans.sums(*_matrix(x), x.dtype, _multiprocessors(x.device))


def _elements(x: Tensor) -> Plan:
    return cuda_plans.elements(*_matrix(x), x.dtype, _multiprocessors(x.device))


def _vector(values: Tensor | None) -> Any:
    """As the loops read it: without strides."""
    return values if values is None else values.resolve_neg().contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels, and how many values of a channel lie side by side: 1 where channels do."""
    samples, channels = x.shape[:2]
    if x.is_contiguous():
        return samples, channels, x.numel() // (samples * channels)
    return x.numel() // channels, channels, 1


def _multiprocessors(device: torch.device) -> int:
    return _count(device.index) if device.type == "cuda" else 4  # Triton's interpreter


@lru_cache(maxsize=64)
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _device_of(x: Tensor) -> Any:
    """Triton starts kernels on the current device and stream."""
    if x.is_cuda and torch.cuda.current_device() != x.device.index:
        return torch.cuda.device(x.device)
    return nullcontext()
