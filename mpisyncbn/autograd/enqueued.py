"""The fused path under the ``stream`` transport: one native call for each direction.

It enqueues the kernels before the exchange, the exchange and the kernels after it, with no Python
between them. fused.py calls it, and goes its own way if this returns None: for a mask, for tensors
that have to be copied first, and on a device without compiled kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import enqueue
from ..batch_stats import BatchStats
from ..kernels import ActivationContext, compiled_programs
from .layer_context import LayerContext

if TYPE_CHECKING:
    from ..kernels.cpu._cpu import Total

__all__ = ["Enqueued", "backward", "forward"]

Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor]


class Enqueued(NamedTuple):
    """What a forward call leaves for its backward call."""

    result: Tensor  # float64: mean, var, invstd, count, and two numbers for running statistics
    total: Total

    def stats(self) -> BatchStats:
        """The statistics as views of the result."""
        channels = len(self.result) // 3 - 1
        mean, var, invstd = self.result[:-3].reshape(3, channels)
        return BatchStats(mean, var, invstd, self.result[-3])


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, layer: LayerContext
) -> tuple[Tensor, Enqueued] | None:
    """``y``, and what backward needs. Records the batch in ``layer.running``.

    Collective: every rank of the group must call.
    """
    group, running = layer.group, layer.running
    group.check_world()
    worker, programs = enqueue.worker_for(group, x), compiled_programs(x)
    if worker is None or programs is None:
        return None
    program = programs.forward_program(x, weight, bias, residual, layer.activation, running)
    if program is None:
        return None
    channels, y = x.shape[1], torch.empty_like(x)
    result = x.new_empty(3 * channels + 3, dtype=torch.float64)
    partials = x.new_empty(program.partials, dtype=torch.float64) if program.partials else None
    mean = result.data_ptr()
    var, invstd, more = (mean + 8 * row * channels for row in (1, 2, 3))
    tensors = x, y, weight, bias, residual, partials
    pointers = [
        *map(_pointer, tensors),
        mean,
        var,
        invstd,
        more,
        *map(_pointer, running[:3] if running else ()),
    ]
    largest = torch.finfo(running.var.dtype if running else torch.float32).max
    streams = enqueue.device_streams(x)
    with enqueue.locked(group, streams, "mpisyncbn:merge_moments"):
        call = enqueue.moments_call(group, layer.call("forward"), channels, largest)
        total = enqueue.new_total()
        count = x.numel() // channels
        worker.enqueue(
            streams.handle(), call, count, total, program.before, [], mean, program.after, pointers
        )
    if running:
        torch._C._increment_version([each for each in running[:3] if each is not None])
    return y, Enqueued(result, total)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    layer: LayerContext,
    context: ActivationContext | None,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> Gradients | None:
    """The gradients of x, weight, bias and residual; None if the host has to take part.

    ``dtypes`` are those of the gradients of weight and bias, None for one that is not needed.
    Collective: every rank of the group must call.
    """
    group, enqueued = layer.group, layer.enqueued
    worker, programs = enqueue.worker_for(group, x), compiled_programs(x)
    if worker is None or programs is None or enqueued is None:
        return None
    _, _, bias, y, residual = context or (None,) * 5
    program = programs.backward_program(dy, x, y, residual, weight, bias, layer.activation, dtypes)
    if program is None:
        return None
    channels, dx = x.shape[1], torch.empty_like(x)
    dz = torch.empty_like(x) if context is not None and context.stores_dz else None
    dweight, dbias = (None if each is None else x.new_empty(channels, dtype=each) for each in dtypes)
    memory = x.new_empty(4 * channels + program.partials, dtype=torch.float64)
    sums, mean = memory.data_ptr(), enqueued.result.data_ptr()
    mean_dy, mean_dy_xmu, partials = (sums + 8 * row * channels for row in (2, 3, 4))
    invstd = mean + 16 * channels
    pointers = [*map(_pointer, (dy, x, y, residual, dz)), mean, invstd, _pointer(weight), _pointer(bias)]
    pointers += [partials, sums, dx.data_ptr(), mean_dy, mean_dy_xmu, _pointer(dweight), _pointer(dbias)]
    streams = enqueue.device_streams(x)
    with enqueue.locked(group, streams, "mpisyncbn:reduce_sums"):
        call = enqueue.sums_call(group, layer.call("backward"), 2 * channels)
        worker.enqueue(
            streams.handle(),
            call,
            0,
            enqueued.total,
            program.before,
            [sums],
            mean_dy,
            program.after,
            pointers,
        )
    return dx, dweight, dbias, dy if dz is None else dz


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
