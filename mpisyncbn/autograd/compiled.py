"""The layer for torch.compile, which does not look into the operations that exchange messages.

The compiler fuses the generic kernels with their neighbours. It would drop an exchange whose result
is unused, or run two equal ones once, and then ranks would wait for each other for ever. So each
exchange changes a tensor that outlives the graph, which keeps all exchanges, in order. Each
direction has such a tensor of its own, because a graph refuses its backward pass if a tensor that
it saved has changed since.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, _CachingTorchDispatchMode

from .. import exchange, functional
from ..arguments import check_count
from ..batch_stats import BatchStats
from ..comm import transport
from ..comm.communicator import by_graph_key
from ..kernels import generic
from .layer_context import FunctionContext, is_recomputing, layer_call

__all__ = ["apply"]


def apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str, layer: str, dtype: str
) -> tuple[Tensor, BatchStats]:
    """``y`` and the statistics of the batch, whose count is 0 if a checkpoint repeats the call.

    ``group`` is the ``graph_key`` of a Communicator, ``layer`` the name or key of a layer.
    Collective, forward and backward: every rank of the group must call.
    """
    y, mean, var, invstd, count, first_time = _CompiledBatchNorm.apply(
        x, weight, bias, eps, group, layer, dtype
    )
    return y, BatchStats(mean, var, invstd, count * first_time)


with torch.inference_mode(False), _disable_current_modes():  # the first import may happen in any mode
    _FORWARD_ORDER, _BACKWARD_ORDER = torch.from_numpy(np.zeros(())), torch.from_numpy(np.zeros(()))


def _order_token(token: Tensor, x: Tensor) -> Tensor:
    """The tensor that an exchange changes: ``token``, or a new one if ``x`` is meta or fake."""
    return token if torch.compiler.is_compiling() else x.new_zeros(())


_LIBRARY = torch.library.Library("mpisyncbn", "DEF")
_HOST_TAKES_PART = (torch.Tag.cudagraph_unsafe,)
_LIBRARY.define(
    "merge_moments(Tensor mean, Tensor m2, SymInt count, Tensor(a!) token, str group, str layer, str dtype, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_HOST_TAKES_PART,
)
_LIBRARY.define(
    "reduce_sums(Tensor sums, Tensor(a!) token, str group, str layer, str direction, str dtype, float eps) "
    "-> Tensor",
    tags=_HOST_TAKES_PART,
)


def _merge_moments_op(
    mean: Tensor, m2: Tensor, count: int, token: Tensor, group: str, layer: str, dtype: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with np.errstate(all="ignore"):
        communicator = by_graph_key(group)
        call = layer_call(communicator.name_of(layer), "forward", m2.shape[-1], dtype, eps)
        total, merged, var = exchange.merge_moments(communicator, call, count, mean, m2)
        merged, var = (transport.from_host(vector, m2) for vector in (merged, var))
    check_count(total, m2)
    # filled on the device, so that the host does not wait for it
    first_time = m2.new_full((), not is_recomputing(), dtype=torch.bool)
    return m2.new_full((), total), merged, var, first_time


def _reduce_sums_op(
    sums: Tensor, token: Tensor, group: str, layer: str, direction: str, dtype: str, eps: float
) -> Tensor:
    communicator = by_graph_key(group)
    call = layer_call(communicator.name_of(layer), direction, sums.shape[-1], dtype, eps)
    (total,) = exchange.reduce_sums(communicator, call, sums.reshape(-1))
    return transport.from_host(total, sums).reshape(sums.shape)


_LIBRARY.impl("merge_moments", _merge_moments_op, "CompositeExplicitAutograd")
_LIBRARY.impl("reduce_sums", _reduce_sums_op, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mpisyncbn::merge_moments",
    lambda mean, m2, *_: _mark_must_save(
        m2.new_empty(()),
        torch.empty_like(m2),
        torch.empty_like(m2),
        m2.new_empty((), dtype=torch.bool),
    ),
)
torch.library.register_fake("mpisyncbn::reduce_sums", lambda sums, *_: torch.empty_like(sums))


def _mark_must_save(*results: Tensor) -> tuple[Tensor, ...]:
    """The results, after telling a checkpoint in the traced graph to keep them (torch 2.11)."""
    meta = torch.fx.traceback.current_meta
    if "recompute" in meta:
        meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return results


@torch.ops.mpisyncbn.merge_moments.default.py_impl(_CachingTorchDispatchMode)
def _bypass_checkpoint_mode(_: object, *args: object) -> tuple[Tensor, ...]:
    """Run the exchange as if the graph held no checkpoint, which would repeat it (torch 2.13)."""
    return torch.ops.mpisyncbn.merge_moments(*args)


class _CompiledBatchNorm(torch.autograd.Function):
    """The layer as torch.compile sees it."""

    @staticmethod
    def forward(
        ctx: FunctionContext,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: str,
        layer: str,
        dtype: str,
    ) -> tuple[Tensor, ...]:
        first_time: list[Tensor] = []

        def merge_moments(count: int, mean: Tensor, m2: Tensor) -> tuple[int, Tensor, Tensor]:
            *merged, first = torch.ops.mpisyncbn.merge_moments(
                mean, m2, count, _order_token(_FORWARD_ORDER, x), group, layer, dtype, eps
            )
            first_time.append(first)
            return tuple(merged)

        y, stats, _ = functional.forward(x, weight, bias, eps, generic, merge_moments)
        ctx.save_for_backward(x, weight, *stats)
        # torch does not check attributes for changes by another graph
        ctx.token = _order_token(_BACKWARD_ORDER, x)
        ctx.exchange = group, layer, dtype, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*stats, *first_time)
        return y, *stats, *first_time

    @staticmethod
    def backward(ctx: FunctionContext, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *stats = ctx.saved_tensors
        group, layer, dtype, eps = ctx.exchange

        def reduce_sums(*sums: Tensor) -> tuple[Tensor, ...]:
            total = torch.ops.mpisyncbn.reduce_sums(
                torch.stack(sums), ctx.token, group, layer, "backward", dtype, eps
            )
            return total.unbind()

        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        dx, dweight, dbias, _dz = functional.backward(
            dy, x, BatchStats(*stats), weight, generic, reduce_sums, need_dx
        )
        return (
            dx,
            dweight.to(weight.dtype) if need_dweight else None,
            dbias.to(ctx.bias_dtype) if need_dbias else None,
            *(None,) * 4,
        )
