"""The composite path: kernels and exchanges that autograd can differentiate any number of times.

It is for second derivatives, forward mode and torch.func. The statistics of a forward pass are
known, so this module makes them functions of the input without a message. Only their derivatives
send messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import exchange
from ..batch_stats import BatchStats, invstd_of
from ..comm import transport
from ..errors import on_rank
from ..functional import ReduceSums
from ..kernels import Kernels, generic, masked
from ..torch_versions import untraced
from .layer_context import FunctionContext, LayerContext

__all__ = [
    "differentiable_kernels",
    "differentiable_stats",
    "differentiable_sums",
    "differentiable_tangents",
    "refuse_batched",
]


class _MergeMoments(torch.autograd.Function):
    """Mean and variance of the group as functions of those of this rank.

    Their values are known, so ``forward`` sends no message.
    """

    @staticmethod
    @untraced
    def forward(mean: Tensor, m2: Tensor, count: int, layer: LayerContext) -> tuple[Tensor, Tensor]:
        return tuple(torch.as_tensor(v).clone() for v in layer.device_stats[:2])  # type: ignore[return-value]

    @staticmethod
    def setup_context(
        ctx: FunctionContext,
        inputs: tuple[Tensor, Tensor, int, LayerContext],
        output: tuple[Tensor, Tensor],
    ) -> None:
        mean, _, ctx.count, ctx.layer = inputs
        ctx.total = max(int(ctx.layer.stats.count), 1)
        ctx.rows = mean.ndim == 2  # the two parts of a float64 mean: only their sum matters here
        # the input itself: a sum computed here would be a constant for further derivatives
        ctx.save_for_backward(mean, output[0])
        ctx.save_for_forward(mean, output[0])

    @staticmethod
    def backward(ctx: FunctionContext, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        mean, merged = ctx.saved_tensors
        mean = mean.sum(0) if ctx.rows else mean
        dmean, dvar = differentiable_sums(ctx.layer, "gradient of the moments")(dmean, dvar)
        # var = (sum m2 + sum count * (mean - merged)**2) / total, whose slope in merged is zero
        dmean = (dmean + 2 * (mean - merged) * dvar) * (ctx.count / ctx.total)
        return dmean.expand(2, -1) if ctx.rows else dmean, dvar / ctx.total, None, None

    @staticmethod
    def jvp(
        ctx: FunctionContext, dmean: Tensor | None, dm2: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor]:
        with differentiable_tangents(ctx) as (mean, merged):
            mean = mean.sum(0) if ctx.rows else mean
            dmean = (
                torch.zeros_like(mean)
                if dmean is None
                else (dmean.sum(0) if ctx.rows else dmean) * (ctx.count / ctx.total)
            )
            dvar = 2 * (mean - merged) * dmean
            if dm2 is not None:
                dvar = dvar + dm2 / ctx.total
            dmean, dvar = differentiable_sums(ctx.layer, "tangent of the moments")(dmean, dvar)
            return dmean, dvar

    @staticmethod
    def vmap(
        info: object,
        in_dims: tuple[int | None, ...],
        mean: Tensor,
        m2: Tensor,
        count: int,
        layer: LayerContext,
    ) -> tuple[tuple[Tensor, Tensor], tuple[None, None]]:
        refuse_batched(in_dims)
        return _MergeMoments.apply(mean, m2, count, layer), (None, None)


class _AllReduce(torch.autograd.Function):
    """The sum over the group of float64 values of any shape. It is its own adjoint."""

    @staticmethod
    @untraced
    def forward(values: Tensor, layer: LayerContext, direction: str) -> Tensor:
        (total,) = exchange.reduce_sums(layer.group, layer.call(direction), values.reshape(-1))
        return transport.from_host(total, values).reshape(values.shape)

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: tuple[Tensor, LayerContext, str], output: Tensor) -> None:
        _, ctx.layer, ctx.direction = inputs

    @staticmethod
    def backward(ctx: FunctionContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllReduce.apply(grad, ctx.layer, f"adjoint of the {ctx.direction}"), None, None

    @staticmethod
    def jvp(ctx: FunctionContext, tangent: Tensor, *_: None) -> Tensor:
        with differentiable_tangents(ctx):
            return _AllReduce.apply(tangent, ctx.layer, f"tangent of the {ctx.direction}")

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int, None, None], values: Tensor, layer: LayerContext, direction: str
    ) -> tuple[Tensor, int]:
        return _AllReduce.apply(values.movedim(in_dims[0], 0), layer, direction), 0


@contextmanager
def differentiable_tangents(ctx: FunctionContext) -> Iterator[list[Any]]:
    """The saved tensors, in a context in which forward mode differentiates ``jvp`` again.

    torch turns forward mode off while it calls ``jvp``, so that tangents of tangents would be 0.
    With it on, the saved tensors must not have the tangents that ``jvp`` is given already.
    """
    saved = [None if each is None else forward_ad.unpack_dual(each).primal for each in ctx.saved_tensors]
    with forward_ad._set_fwd_grad_enabled(True):
        yield saved


def refuse_batched(in_dims: tuple[int | None, ...]) -> None:
    """Raise NotImplementedError for a batched input.

    torch.func.jacrev and jacfwd batch gradients and tangents, not the input.
    """
    if any(dim is not None for dim in in_dims):
        raise NotImplementedError(
            "vmap over the input or the parameters of a synchronized batch norm is not supported: it would "
            f"be one collective per sample{on_rank()}; call it on the whole batch"
        )


def differentiable_kernels(mask: Tensor | None) -> Kernels:
    """Kernels that torch differentiates any number of times."""
    return generic if mask is None else masked.with_mask(masked, mask)


def differentiable_stats(x: Tensor, layer: LayerContext, kernels: Kernels) -> BatchStats:
    """The statistics of the forward pass as differentiable functions of ``x``."""
    if layer.enqueued is not None:
        layer.stats = layer.device_stats = layer.enqueued.stats()
    count, mean, m2 = kernels.local_moments(x)
    mean, var = _MergeMoments.apply(mean, m2, count, layer)
    return BatchStats(mean, var, invstd_of(var, layer.eps), layer.stats.count)


def differentiable_sums(layer: LayerContext, direction: str) -> ReduceSums:
    """A function that sums vectors over the group, and is differentiable any number of times."""

    def reduce_sums(*sums: Tensor) -> tuple[Tensor, ...]:
        return _AllReduce.apply(torch.stack(sums), layer, direction).unbind()

    return reduce_sums
