"""The fused path under the ``stream`` transport: one native call for each direction.

It enqueues the kernels before the exchange, the exchange and the kernels after it, with no Python
between them. fused.py calls this module, and does the work itself if it returns None: for empty
tensors, for those that have to be copied first, while the host has to take part in exchanges, and
on a device without compiled kernels. With a mask, fused.py does not call it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import enqueue
from ..batch_stats import BatchStats
from ..kernels import ActivationContext, compiled_programs, describe
from ..running_stats import can_record, only_torch_changes
from .layer_context import LayerContext

if TYPE_CHECKING:
    from ..comm.streams import Streams
    from ..kernels.cpu._cpu import Call, Total
    from ..kernels.cuda.programs import Program
    from ..kernels.protocol import Running

__all__ = ["Enqueued", "backward", "forward"]

_MOST = 4096  # passes that are kept prepared; a model has fewer, unless the shapes of its data change

Dtypes = tuple[torch.dtype | None, torch.dtype | None]
Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor]


class Enqueued(NamedTuple):
    """The results of a forward call but ``y``, for its backward and for running statistics."""

    result: Tensor  # float64: mean, var, invstd, count, and two numbers for running statistics
    total: Total
    recorded: bool  # whether the call updates running statistics

    def stats(self) -> BatchStats:
        """The statistics as views of the result."""
        channels = len(self.result) // 3 - 1
        mean, var, invstd = self.result[:-3].reshape(3, channels)
        return BatchStats(mean, var, invstd, self.result[-3])


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, layer: LayerContext
) -> tuple[Tensor, Enqueued] | None:
    """Return ``y`` and the results that backward needs; None if fused.py has to do the work.

    The call also records the batch in ``layer.running``, if the kernels can change these tensors.
    Collective: every rank of the group must call.
    """
    group, running = layer.group, _running_of(layer)
    group.check_world()
    worker = enqueue.worker_for(group, x)
    if worker is None or layer.description is None:
        return None
    momentum = None if running is None else running.momentum
    key = layer.name, layer.description, layer.activation, layer.eps, momentum
    prepared = group.prepared.get(key) or _prepare_forward(key, x, weight, bias, residual, layer, running)
    if prepared is None:
        return None
    program, call, streams, channels, records = prepared
    y, result = torch.empty_like(x), x.new_empty(3 * channels + 3, dtype=torch.float64)
    partials = x.new_empty(program.partials, dtype=torch.float64) if program.partials else None
    mean, row = result.data_ptr(), 8 * channels
    vectors = mean, mean + row, mean + 2 * row, mean + 3 * row  # mean, var, invstd, and three numbers
    pointers = x, y, weight, bias, residual, partials, *vectors, *(running[:3] if running else ())
    with enqueue.locked(group, "mpisyncbn:merge_moments"):
        total, count = enqueue.new_total(), x.numel() // channels
        worker.enqueue(
            streams.device_and_stream(), call, count, total, program.before, [], mean, program.after, pointers
        )
    if running is not None and records:
        torch._C._increment_version([each for each in running[:3] if each is not None])
    return y, Enqueued(result, total, records)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    layer: LayerContext,
    context: ActivationContext | None,
    dtypes: Dtypes,
) -> Gradients | None:
    """The gradients of x, weight, bias and residual; None if fused.py has to do the work.

    ``dtypes`` are those of the gradients of weight and bias, None for one that is not needed.
    Collective: every rank of the group must call.
    """
    group, enqueued = layer.group, layer.enqueued
    worker = enqueue.worker_for(group, x)
    if worker is None or enqueued is None:
        return None
    _, _, bias, y, residual = context or (None,) * 5
    tensors = dy, x, y, residual, weight, bias
    description = describe(*tensors)  # anew: a hook for saved tensors may have moved them
    if description is None:
        return None
    key = layer.name, description, layer.activation, layer.eps, dtypes
    prepared = group.prepared.get(key) or _prepare_backward(key, *tensors, dtypes, layer)
    if prepared is None:
        return None
    program, call, streams, channels, _ = prepared
    dx = torch.empty_like(x)
    dz = torch.empty_like(x) if context is not None and context.stores_dz else None
    dweight = None if dtypes[0] is None else x.new_empty(channels, dtype=dtypes[0])
    dbias = None if dtypes[1] is None else x.new_empty(channels, dtype=dtypes[1])
    memory = x.new_empty(4 * channels + program.partials, dtype=torch.float64)
    sums, mean, row = memory.data_ptr(), enqueued.result.data_ptr(), 8 * channels
    mean_dy = sums + 2 * row
    pointers = (
        *(dy, x, y, residual, dz, mean, mean + 2 * row, weight, bias, sums + 4 * row, sums),
        *(dx, mean_dy, mean_dy + row, dweight, dbias),
    )
    before, after = program.before, program.after
    with enqueue.locked(group, "mpisyncbn:reduce_sums"):
        worker.enqueue(
            streams.device_and_stream(), call, 0, enqueued.total, before, [sums], mean_dy, after, pointers
        )
    return dx, dweight, dbias, dy if dz is None else dz


class _Prepared(NamedTuple):
    """The parts of a forward or backward pass that are the same at each call."""

    program: Program
    call: Call
    streams: Streams
    channels: int
    records: bool  # whether the pass updates running statistics


def _running_of(layer: LayerContext) -> Running | None:
    """The running statistics; None without any, or if only torch may change them."""
    running = layer.running
    return None if running is None or any(map(only_torch_changes, running[:3])) else running


def _prepare_forward(
    key: Hashable,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    layer: LayerContext,
    running: Running | None,
) -> _Prepared | None:
    programs, channels = compiled_programs(x), x.shape[1]
    if programs is None:
        return None
    if running is not None and not can_record(x, running):
        running = None
    tensors = x, weight, bias, residual
    program = programs.forward_program(*tensors, layer.activation, running, layer.description)
    if program is None:
        return None
    largest = torch.finfo(torch.float32 if running is None else running.var.dtype).max
    call = enqueue.moments_call(layer.group, layer.call("forward"), channels, largest)
    records = running is not None
    return _keep(key, layer, _Prepared(program, call, enqueue.device_streams(x), channels, records))


def _prepare_backward(
    key: tuple[Hashable, ...],
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dtypes: Dtypes,
    layer: LayerContext,
) -> _Prepared | None:
    programs, channels = compiled_programs(x), x.shape[1]
    if programs is None:
        return None
    tensors = dy, x, y, residual, weight, bias
    program = programs.backward_program(*tensors, layer.activation, dtypes, key[1])
    if program is None:
        return None
    call = enqueue.sums_call(layer.group, layer.call("backward"), 2 * channels)
    return _keep(key, layer, _Prepared(program, call, enqueue.device_streams(x), channels, False))


def _keep(key: Hashable, layer: LayerContext, prepared: _Prepared) -> _Prepared:
    kept = layer.group.prepared
    if len(kept) >= _MOST:
        kept.clear()
    kept[key] = prepared
    return prepared
