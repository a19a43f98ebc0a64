"""The fused path: one ``autograd.Function`` over the kernels for the place where the data lives.

It has first derivatives in reverse mode, which training needs. It leaves all others to the
composite path (composite.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import exchange, functional
from ..arguments.arrays import dtype_name
from ..comm import transport
from ..errors import MPISyncBNError, on_rank
from ..kernels import (
    NO_ACTIVATION,
    ActivationContext,
    Array,
    BackwardKernels,
    generic,
    kernels_for,
    where_true,
)
from ..kernels.from_output import DTYPES, FromOutput, channels_to_keep
from ..torch_versions import untraced
from . import enqueued
from .composite import (
    differentiable_kernels,
    differentiable_stats,
    differentiable_sums,
    differentiable_tangents,
    refuse_batched,
)
from .layer_context import FunctionContext, LayerContext

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["apply"]

# x, weight, bias, residual, mask, and the context of the call
Inputs: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, LayerContext]


@untraced
def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    layer: LayerContext,
) -> Tensor:
    """Return ``y``, differentiable in the tensors, and set the statistics of ``layer``.

    Collective, forward and backward: every rank of the group must call.
    """
    transforms = torch._C._are_functorch_transforms_active()
    function = _Transformable if transforms else _SyncBatchNorm
    if layer.keeps_output:  # not on a device, where the host would wait; other derivatives need the input
        can_choose = torch.is_grad_enabled() and transport.on_host(x) and dtype_name(x.dtype) in DTYPES
        layer.keeps_output = can_choose and not transforms and not _has_tangent(x, weight, bias)
    if layer.description is not None and not transforms:
        # torch's own apply looks for tensors that a transform has left behind, which takes a tenth
        # of the time of a small layer. A tensor that has memory of its own is not such a tensor.
        return _apply_to_plain(x, weight, bias, residual, mask, layer)
    return function.apply(x, weight, bias, residual, mask, layer)


class _SyncBatchNorm(torch.autograd.Function):
    """The layer as one operation of autograd."""

    @staticmethod
    def forward(ctx: FunctionContext, *inputs: Unpack[Inputs]) -> Tensor:
        y = _forward(*inputs)
        _save_for_backward(ctx, inputs, y)
        return y

    @staticmethod
    @untraced
    def backward(ctx: FunctionContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer = ctx.layer
        if torch._C._functorch.is_legacy_batchedtensor(dy):
            raise _no_vectorize(layer)
        # With create_graph, the result will be differentiated again. Gradients may also be batched.
        composite = torch.is_grad_enabled() or torch._C._functorch.is_batchedtensor(dy)
        if composite and layer.keeps_output:
            raise _only_first_derivatives(layer)
        x, weight, mask, *saved = ctx.saved_tensors
        kept = saved.pop() if ctx.kept_channels is not None else None
        has_activation = layer.activation != NO_ACTIVATION
        context = ActivationContext(layer.activation, weight, *saved) if has_activation else None
        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        if layer.enqueued is not None and need_dx and not composite:
            wanted = weight.dtype if need_dweight else None, ctx.bias_dtype if need_dbias else None
            found = enqueued.backward(dy, x, weight, layer, context, wanted)
            if found is not None:
                return *found[:3], found[3] if ctx.has_residual else None, None, None
        kernels: BackwardKernels
        if composite:
            of_all_orders = differentiable_kernels(mask)
            stats, kernels = differentiable_stats(x, layer, of_all_orders), of_all_orders
            reduce_sums = differentiable_sums(layer, "backward")
        else:
            stats = layer.device_stats if layer.enqueued is None else layer.enqueued.stats()
            kernels = kernels_for(x, mask)
            reduce_sums = layer.bind(exchange.reduce_sums, "backward")
        if ctx.kept_channels is not None:
            kernels = FromOutput(kernels, weight, saved[0], ctx.kept_channels, kept)
        with np.errstate(all="ignore"):
            dx, dweight, dbias, dz = functional.backward(
                dy, x, stats, weight, kernels, reduce_sums, need_dx, context
            )
            return (
                dx,
                _to_dtype(dweight, weight.dtype) if need_dweight else None,
                _to_dtype(dbias, ctx.bias_dtype) if need_dbias else None,
                (dz if context is not None else where_true(dz, mask)) if ctx.has_residual else None,
                None,
                None,
            )

    @staticmethod
    @untraced
    def jvp(
        ctx: FunctionContext,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        dresidual: Tensor | None,
        *_: None,
    ) -> Tensor:
        # With unit weight the Jacobian with respect to x is symmetric, so forward mode is the
        # backward formula applied to the tangent.
        with differentiable_tangents(ctx) as (x, weight, mask, *saved):
            layer, kernels = ctx.layer, differentiable_kernels(mask)
            stats = differentiable_stats(x, layer, kernels)
            dy = torch.zeros_like(x)
            if dx is not None:
                reduce_sums = differentiable_sums(layer, "tangent")
                dy = dy + functional.backward(dx, x, stats, weight, kernels, reduce_sums)[0]
            if dweight is not None:
                dy = dy + kernels.normalize(x, stats.mean, stats.invstd, dweight, None)
            if dbias is not None:
                dy = dy + generic._channels(dbias, x).to(dy.dtype)
            if dresidual is not None:
                dy = dy + dresidual
            dy = where_true(dy, mask)
            if saved:
                context = ActivationContext(layer.activation, weight, *saved)
                dy = kernels.backward_reduce(dy, x, stats.mean, stats.invstd, context)[2].to(x.dtype)
            return dy


_apply_to_plain = super(torch.autograd.Function, _SyncBatchNorm).apply


class _Transformable(_SyncBatchNorm):
    """The layer for torch.func, which requires ``setup_context``. That is slower."""

    @staticmethod
    def forward(*inputs: Unpack[Inputs]) -> Tensor:  # type: ignore[override]  # without ctx
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: Inputs, output: Tensor) -> None:
        _save_for_backward(ctx, inputs, output)

    @staticmethod
    def vmap(info: object, in_dims: tuple[int | None, ...], *inputs: Unpack[Inputs]) -> tuple[Tensor, None]:
        refuse_batched(in_dims)
        return _Transformable.apply(*inputs), None


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    layer: LayerContext,
) -> Tensor:
    """Return ``y``, and set the statistics of ``layer``."""
    if mask is None and layer.group.stream is not None and not torch._C._are_functorch_transforms_active():
        found = enqueued.forward(x, weight, bias, residual, layer)
        if found is not None:
            y, layer.enqueued = found
            return y
    with np.errstate(all="ignore"):  # no warnings: NaN and infinity are valid data
        y, layer.stats, layer.device_stats = functional.forward(
            x,
            weight,
            bias,
            layer.eps,
            kernels_for(x, mask),
            layer.bind(exchange.merge_moments, "forward"),
            residual,
            layer.activation,
        )
    return y


def _save_for_backward(ctx: FunctionContext, inputs: Inputs, y: Tensor) -> None:
    x, weight, bias, residual, mask, ctx.layer = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.kept_channels = None
    if ctx.layer.keeps_output:
        _save_output(ctx, x, weight, bias, mask, y)
        return
    saved: tuple[Tensor | None, ...] = (x, weight, mask)
    activation = ctx.layer.activation
    if activation != NO_ACTIVATION:
        # With a residual, x alone does not determine the activation's input.
        by_sign = activation.sign_decides
        saved += (bias, y if ctx.has_residual and by_sign else None, None if by_sign else residual)
    ctx.save_for_backward(*saved)
    if forward_ad._current_level >= 0:  # else no forward mode can follow
        ctx.save_for_forward(*saved)


def _save_output(
    ctx: FunctionContext,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    y: Tensor,
) -> None:
    """Save the output in place of the input, and the input of the channels that need it."""
    layer = ctx.layer
    _, var, invstd, count = layer.stats
    chosen = channels_to_keep(dtype_name(x.dtype), var, invstd, count, weight, bias, layer.activation)
    if 2 * len(chosen) > len(var):
        ctx.save_for_backward(x, weight, mask, bias)
        return
    ctx.kept_channels = chosen
    kept = x.detach()[:, torch.from_numpy(chosen)] if len(chosen) else None
    ctx.save_for_backward(y, weight, mask, bias, kept)


def _has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward mode differentiates with respect to some tensor."""
    return any(each is not None and forward_ad.unpack_dual(each).tangent is not None for each in tensors)


def _only_first_derivatives(layer: LayerContext) -> MPISyncBNError:
    return MPISyncBNError(
        f"expected no create_graph and no batched gradients in the backward pass of layer {layer.name!r}, "
        f"which is memory_efficient{on_rank()}: it keeps its output, which tells the first derivatives only. "
        "Set memory_efficient to False for second derivatives"
    )


def _no_vectorize(layer: LayerContext) -> MPISyncBNError:
    return MPISyncBNError(
        "expected no is_grads_batched of torch.autograd.grad, nor vectorize of torch.autograd.functional, in "
        f"the backward pass of layer {layer.name!r}{on_rank()}: leave it out, or use torch.func.jacrev, "
        "hessian or vmap, which work"
    )


def _to_dtype(vector: Array, dtype: torch.dtype) -> Tensor:
    """A gradient of a parameter as a tensor of that parameter's dtype."""
    if not isinstance(vector, np.ndarray):
        return vector.to(dtype)
    if dtype == torch.float32:  # NumPy converts a short vector in a fifth of torch's time
        return torch.from_numpy(vector.astype(np.float32))
    return torch.from_numpy(vector).to(dtype)
