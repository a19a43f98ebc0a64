"""The layer for torch.compile, which does not look into operations that exchange messages.

Each direction is one such operation, with the kernels of the eager layer: the sums over the batch,
the exchange, and the vectors that the element-wise work needs. That work is left to the compiler,
which fuses it with its neighbours. The vectors come rounded to the dtype of that work, because the
compiler would repeat their arithmetic in float64 for every element.

The compiler would drop an operation whose result is unused, or run two equal ones once, and then
ranks would wait for each other for ever. So each changes a tensor that outlives the graph, which
keeps all exchanges, in order. Each direction has such a tensor of its own, because a graph refuses
its backward pass if a tensor that it saved has changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, _CachingTorchDispatchMode

from .. import config, exchange, torch_versions
from ..arguments import check_count
from ..batch_stats import BatchStats, invstd_of
from ..comm import transport
from ..comm.communicator import by_graph_key
from ..errors import MPISyncBNError, on_rank
from ..kernels import Array, has_float64, kernels_for, where_true
from .composite import differentiable_kernels
from .layer_context import FunctionContext, is_recomputing, layer_call

__all__ = ["apply"]


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    graph_key: str,
    layer: str,
    dtype: str,
) -> tuple[Tensor, BatchStats]:
    """``y`` and the statistics of the batch, whose count is 0 if a checkpoint repeats the call.

    ``y`` is 0 where the mask is false. ``graph_key`` is that of a Communicator, ``layer`` the name
    or key of a layer. Collective, forward and backward: every rank of the group must call.
    """
    y, stats, count, first = _CompiledBatchNorm.apply(x, weight, bias, mask, eps, graph_key, layer, dtype)
    # detached, or running statistics would require gradients after a recorded graph
    return y, BatchStats._make((*stats.detach().unbind(), count.detach() * first))


@contextmanager
def _outside_of_modes() -> Iterator[None]:
    """A context for tensors that outlive the active modes and transforms of torch.func."""
    with torch.inference_mode(False), _disable_current_modes(), torch._C._DisableFuncTorch():
        yield


with _outside_of_modes():  # the first import may happen in any of them
    # not float64: torch makes a symbol of the value of such a tensor, and traces each graph twice
    _FORWARD_ORDER, _BACKWARD_ORDER = (torch.from_numpy(np.zeros((), np.float32)) for _ in range(2))


_ON_DEVICE: dict[tuple[torch.device, str], Tensor] = {}  # tokens for CUDA graphs, by device and direction
_FOR_GRAPHS = config.transport() == "stream" and not config.debug()


def _order_token(token: Tensor, x: Tensor) -> Tensor:
    """The tensor that an exchange changes: ``token``, or a new one if ``x`` is meta or fake.

    A CUDA graph takes no tensor of the host. The stream transport has one for each device.
    """
    if not torch.compiler.is_compiling():
        return x.new_zeros(())
    if not (_FOR_GRAPHS and x.is_cuda):
        return token
    return _forward_token(x.device) if token is _FORWARD_ORDER else _backward_token(x.device)


# Two functions, because the compiler names a constant after the function that returned it.
@torch_versions.constant_when_compiled
def _forward_token(device: torch.device) -> Tensor:
    return _token_on(device, "forward")


@torch_versions.constant_when_compiled
def _backward_token(device: torch.device) -> Tensor:
    return _token_on(device, "backward")


def _token_on(device: torch.device, direction: str) -> Tensor:
    found = _ON_DEVICE.get((device, direction))
    if found is None:
        with _outside_of_modes():
            found = torch.zeros((), device=device, dtype=torch.float32)
        torch._dynamo.mark_static_address(found, guard=False)
        _ON_DEVICE[device, direction] = found
    return found


_LIBRARY = torch.library.Library("mpisyncbn", "DEF")
# the host takes part, and the kernels read any memory format
_TAGS = (*(() if _FOR_GRAPHS else torch_versions.HOST_TAKES_PART), torch.Tag.flexible_layout)
_LIBRARY.define(
    "batch_stats(Tensor x, Tensor? mask, Tensor(a!) token, str group, str layer, str dtype, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "batch_sums(Tensor dy, Tensor x, Tensor? mask, Tensor stats, Tensor count, Tensor(a!) token, str group, "
    "str layer, str dtype, float eps) -> (Tensor, Tensor)",
    tags=_TAGS,
)


def _batch_stats_op(
    x: Tensor, mask: Tensor | None, token: Tensor, graph_key: str, layer: str, dtype: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do the forward pass up to and including its exchange.

    Returns the rows mean, var and invstd; the rows that the element-wise work needs, which are the
    mean in two parts, and invstd; the count; and False if a checkpoint repeats the call, else True.
    """
    with np.errstate(all="ignore"):  # no warnings: NaN and infinity are valid data
        group = by_graph_key(graph_key)
        call = layer_call(group.name_of(layer), "forward", x.shape[1], dtype, eps)
        moments = kernels_for(x, mask).local_moments(x)
        total, mean, var = exchange.merge_moments(group, call, *moments)
        stats = _rows(x, mean, var, invstd_of(var, eps))
    check_count(total, x)
    # filled on the device, so that the host does not wait for it
    first_time = stats.new_full((), not is_recomputing(), dtype=torch.bool)
    count = stats.new_full((), total) if isinstance(total, int) else total.clone()
    return stats, _rounded(stats[0], stats[2], x), count, first_time


def _batch_sums_op(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    count: Tensor,
    token: Tensor,
    graph_key: str,
    layer: str,
    dtype: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Do the backward pass up to and including its exchange.

    Returns the rows dweight and dbias, sums of this rank; and the rows for ``dx``: the mean of dy
    in two parts, and that of ``dy * xhat``, the factor of ``xhat``, the normalized input.
    """
    with np.errstate(all="ignore"):
        group = by_graph_key(graph_key)
        call = layer_call(group.name_of(layer), "backward", x.shape[1], dtype, eps)
        mean, invstd = stats[0], stats[2]
        vectors = transport.to_host(mean, invstd) if transport.on_host(x) else (mean, invstd)
        sums = kernels_for(x, mask).backward_reduce(dy, x, *vectors)[:2]
        totals = exchange.reduce_sums(group, call, *sums)
    sum_dy, sum_dy_xmu = _rows(x, *sums)
    # if no rank has a value, all sums are 0
    mean_dy, mean_dy_xmu = _rows(x, *totals) / (count + (count == 0))
    return torch.stack((sum_dy_xmu * invstd, sum_dy)), _rounded(mean_dy, invstd * mean_dy_xmu, x)


def _rows(x: Tensor, *vectors: Array) -> Tensor:
    """The vectors as rows of one tensor, on the device of ``x``."""
    if not isinstance(vectors[0], np.ndarray):
        return torch.stack(vectors)
    return transport.from_host(np.concatenate(vectors), x).reshape(len(vectors), -1)


def _rounded(mean: Tensor, factor: Tensor, x: Tensor) -> Tensor:
    """Rows in the dtype of the element-wise work: ``mean``, what rounding it lost, ``factor``."""
    dtype = _compute_dtype(x)
    rounded = mean.to(dtype)
    return torch.stack((rounded, (mean - rounded).to(dtype), factor.to(dtype)))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _NoDerivative(torch.autograd.Function):
    """Results of an operation. Autograd has no derivative of it: ``_CompiledBatchNorm`` has that.

    A graph of torch.export holds the operations alone, and so does a graph of make_fx.
    """

    @staticmethod
    def forward(ctx: FunctionContext, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = tuple(each.view_as(each) for each in tensors[count:])
        ctx.mark_non_differentiable(*[each for each in results if not each.is_floating_point()])
        return results

    @staticmethod
    def backward(ctx: FunctionContext, *_: Tensor) -> NoReturn:
        raise MPISyncBNError(
            "expected no gradients through batch statistics in an exported or recorded graph, which has no "
            f"derivative of them{on_rank()}: train the model before you export it, or revert_sync_batchnorm "
            "it first"
        )


def _without_derivative(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The operation for autograd: its results raise an error when they are differentiated."""
    operation = getattr(torch.ops.mpisyncbn, name).default

    def call(*args: object) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = operation(*args)
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in args):
            inputs = [each for each in args if isinstance(each, Tensor)]
            return _NoDerivative.apply(len(inputs), *inputs, *results)
        return results

    return call


for _name, _op in (("batch_stats", _batch_stats_op), ("batch_sums", _batch_sums_op)):
    _LIBRARY.impl(_name, torch_versions.untraced(_op), "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _without_derivative(_name), "Autograd")


def _fake_batch_stats(x: Tensor, *_: object) -> tuple[Tensor, ...]:
    stats, rounded = _fake_rows(x, 3), x.new_empty((3, x.shape[1]), dtype=_compute_dtype(x))
    return _mark_must_save(stats, rounded, stats.new_empty(()), stats.new_empty((), dtype=torch.bool))


def _fake_batch_sums(dy: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    from torch._dynamo import compiled_autograd, config  # only here: it takes as long as importing torch

    if config.compiled_autograd or compiled_autograd.compiled_autograd_enabled:
        raise MPISyncBNError(
            "compiled autograd cannot run the backward pass of a synchronized layer in a compiled graph"
            f"{on_rank()}: torch forgets there the tensor that keeps exchanges in order. Leave "
            "torch._dynamo.config.compiled_autograd off, or the layer out of the graph"
        )
    return _fake_rows(x, 2), x.new_empty((3, x.shape[1]), dtype=_compute_dtype(x))


def _fake_rows(x: Tensor, count: int) -> Tensor:
    return x.new_empty((count, x.shape[1]), dtype=torch.float64 if has_float64(x) else torch.float32)


torch.library.register_fake("mpisyncbn::batch_stats", _fake_batch_stats)
torch.library.register_fake("mpisyncbn::batch_sums", _fake_batch_sums)


def _mark_must_save(*results: Tensor) -> tuple[Tensor, ...]:
    """Tell the compiler to keep the results for the backward pass, and return them.

    Else checkpoints (torch 2.11) and ``activation_memory_budget`` would repeat the exchange there.
    """
    meta = torch.fx.traceback.current_meta
    if "from_node" in meta:  # it is that of a node, and not torch's own, which lasts
        meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return results


@torch.ops.mpisyncbn.batch_stats.default.py_impl(_CachingTorchDispatchMode)
def _bypass_checkpoint_mode(_: object, *args: object) -> tuple[Tensor, ...]:
    """Run the exchange as if the graph held no checkpoint, which would repeat it (torch 2.13)."""
    return torch.ops.mpisyncbn.batch_stats(*args)


class _CompiledBatchNorm(torch.autograd.Function):
    """The layer as torch.compile sees it."""

    @staticmethod
    def forward(
        ctx: FunctionContext,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        eps: float,
        graph_key: str,
        layer: str,
        dtype: str,
    ) -> tuple[Tensor, ...]:
        token = _order_token(_FORWARD_ORDER, x)
        stats, rounded, count, first_time = torch.ops.mpisyncbn.batch_stats(
            x, mask, token, graph_key, layer, dtype, eps
        )
        y = _normalized(x, rounded)
        if weight is not None:
            y = y * _channels(weight, x)
        if bias is not None:
            y = y + _channels(bias, x)
        y = where_true(y, mask)
        # If to() returns its input itself, torch 2.11 gives the result no gradient.
        y = y if y.dtype == x.dtype else y.to(x.dtype)
        ctx.save_for_backward(x, weight, mask, stats, rounded, count)
        # An attribute, because torch checks saved tensors for changes by another graph.
        ctx.token = _order_token(_BACKWARD_ORDER, x)
        ctx.exchange = graph_key, layer, dtype, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(stats, count, first_time)
        return y, stats, count, first_time

    @staticmethod
    def backward(ctx: FunctionContext, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, stats, rounded, count = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        dx = None
        if need_dx:
            sums, of_dy = torch.ops.mpisyncbn.batch_sums(dy, x, mask, stats, count, ctx.token, *ctx.exchange)
            dweight, dbias = sums.unbind()
            dx = _centered(dy, of_dy) - _normalized(x, rounded) * _row(of_dy, 2, x)
            if weight is not None:
                dx = dx * _channels(weight, x)
            dx = where_true((dx * _row(rounded, 2, x)).to(x.dtype), mask)
        else:  # without dx, no exchange is needed
            mean, _var, invstd = stats.unbind()
            dbias, dweight, _dz = differentiable_kernels(mask).backward_reduce(dy, x, mean, invstd)
            dweight = dweight * invstd
        return (
            dx,
            dweight.to(weight.dtype) if need_dweight else None,
            dbias.to(ctx.bias_dtype) if need_dbias else None,
            *(None,) * 5,
        )


def _normalized(x: Tensor, rounded: Tensor) -> Tensor:
    return _centered(x, rounded) * _row(rounded, 2, x)


def _centered(x: Tensor, rounded: Tensor) -> Tensor:
    """``x`` less the mean, as exact as if it were subtracted in float64."""
    return x.to(rounded.dtype) - _row(rounded, 0, x) - _row(rounded, 1, x)


def _row(rows: Tensor, index: int, x: Tensor) -> Tensor:
    # select(), since indexing asks for a device that only a fake tensor may have
    return _channels(rows.select(0, index), x)


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    """``vector`` of length C, shaped to broadcast against ``x``."""
    return vector.to(_compute_dtype(x)).reshape((1, -1) + (1,) * (x.ndim - 2))
