"""Synchronized batch norm as a torch operation: any number of derivatives, in both modes.

Two paths through the same algorithm (functional.py):

- fused: kernels for the place where the data lives, one ``autograd.Function``. First derivatives
  in reverse mode, which is what training needs.
- composite: generic kernels, made of differentiable torch operations, and the two exchanges as
  differentiable operations. Everything else: second derivatives, forward mode, torch.func, and
  torch.compile, which fuses it with its neighbours around the opaque exchange.

Both send the same messages in the same order, so ranks agree whichever path they take.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, _CachingTorchDispatchMode

from .. import exchange, functional, profiling
from ..arguments import UNNAMED, check_arguments, check_count, check_fused, check_tensor
from ..comm import transport
from ..comm.communicator import Communicator, by_handle, resolve
from ..errors import on_rank
from ..fingerprint import Call
from ..functional import BatchStats
from ..kernels import Activation, ActivationContext, Kernels, activation_named, generic, kernels_for, native
from ..running_stats import record_batch
from .evaluation import evaluate, finish

__all__ = ["batch_norm", "fits", "sync_batch_norm"]

profiling.find_torch()


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` over the batch of all ranks of a group.

    Args:
        input: ``(N, C, *)``, at least 2-D; float32, float64, bfloat16 or float16. N may differ between
            ranks, and be 0.
        running_mean, running_var: of length C, updated in place while training; or None.
        weight, bias: of length C, or None. With half-precision input they may be float32.
        training: if False, normalize with the running statistics, without communication.
        momentum: weight of this batch in the running statistics, from 0 to 1: a number, or a 0-d tensor in
            host memory or on their device.
        eps: added to the variance, at least 0.
        process_group: the ranks to normalize over: an mpi4py communicator, a Communicator, or None
            for the world.
        activation: "relu" for max(., 0) of the output, in the same passes over memory, forward and
            backward; or None.
        residual: like the input; added before the activation, in the same passes; or None.

    Returns:
        ``y``, of the input's shape, dtype and memory format.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype, device or range.
        ValueError: on every rank, where the group has a single value per channel.
        CollectiveMismatchError: on every rank, if the ranks were in different layers or calls.

    Collective while training, forward and backward: every rank of the group must call.
    """
    check_tensor(input)
    if not training:
        check_arguments(input, weight, bias, running_mean, running_var, momentum=momentum, eps=eps)
        check_fused(activation, residual, input)
        if running_mean is None:
            raise ValueError(
                f"expected running_mean and running_var in evaluation, got neither{on_rank()}: hand them "
                "over, or set training to True for the statistics of the batch"
            )
        return evaluate(input, running_mean, running_var, weight, bias, eps, activation, residual)
    if momentum is None:
        raise TypeError(
            f"expected momentum to be a number, got None{on_rank()}: only a layer counts the batches that a "
            "cumulative average needs"
        )
    y, stats, near = batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        momentum,
        eps,
        process_group,
        UNNAMED,
        activation,
        residual,
    )
    if running_mean is not None and running_var is not None:
        record_batch(running_mean, running_var, None, stats, momentum, near)
    return y


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor | None,
    eps: float,
    process_group: Any,
    layer: str,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, BatchStats, BatchStats]:
    """``y`` and, for the running statistics, those of the batch, while training; and the same where ``x`` is.

    ``layer`` is a name, or a key as ``Communicator.name_of`` takes it. Where the call
    repeats an earlier one the statistics have a count of 0, so that they are not entered twice.
    """
    traced = torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)
    if traced or not fits(x, weight, bias, running_mean, running_var, momentum, eps):
        check_arguments(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            momentum=momentum,
            eps=eps,
            layer=layer,
        )
    if activation is not None or residual is not None:
        check_fused(activation, residual, x, layer)
    dtype = functional.layer_dtype(x, weight, bias, running_mean)
    if traced:
        # What is traced knows a group by its handle, because a graph can hold no object.
        handle = _handle(process_group)
        y, mean, var, invstd, count, first_time = _Traced.apply(x, weight, bias, eps, handle, layer, dtype)
        # The compiler does the fusing there.
        stats = BatchStats(mean, var, invstd, count * first_time)
        return finish(y, activation, residual), stats, stats
    group = resolve(process_group)
    step = _Step(group, group.name_of(layer), x.shape[1], dtype, eps, activation_named(activation))
    function = _Transformable if torch._C._are_functorch_transforms_active() else _SyncBatchNorm
    y = function.apply(x, weight, bias, residual, step)
    check_count(step.stats.count, x, layer)
    return y, step.stats._replace(count=0) if _recomputing() else step.stats, step.near


def fits(
    x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: Any, eps: Any
) -> bool:
    """The usual case, seen at a glance. What does not pass may still be right: check_arguments says."""
    host = native()
    try:
        return (
            host is not None
            and eps.__class__ is float
            and 0.0 <= eps < math.inf
            and momentum.__class__ is float
            and 0.0 <= momentum <= 1.0
            and host.passes_fast_check(x, weight, bias, running_mean, running_var)
        )
    except AttributeError:  # of a nested tensor, which has no lengths
        return False


def _handle(process_group: Any) -> str:
    if process_group is None:
        return ""
    if not isinstance(process_group, Communicator) and torch.compiler.is_compiling():
        raise TypeError(
            "expected process_group to be an mpisyncbn.Communicator in a compiled function, got an mpi4py "
            "communicator: make it one outside, mpisyncbn.Communicator(comm)"
        )
    return resolve(process_group).handle


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing does it again there,
    and the batch must not enter the running statistics twice (pytorch#96136)."""
    return torch._C._current_graph_task_id() != -1


class _Step:
    """What one call of a layer shares between its forward and its backward, beside tensors."""

    __slots__ = ("activation", "channels", "dtype", "eps", "group", "layer", "near", "stats")

    def __init__(
        self,
        group: Communicator,
        layer: str,
        channels: int,
        dtype: str,
        eps: float,
        activation: Activation,
    ) -> None:
        self.group, self.layer, self.channels, self.dtype, self.eps = group, layer, channels, dtype, eps
        self.activation = activation
        self.stats: BatchStats  # on the host
        self.near: BatchStats  # where the input is

    def call(self, direction: str) -> Call:
        return _call(self.layer, direction, self.channels, self.dtype, self.eps)

    def exchange(self, verb: Any, direction: str) -> Any:
        return partial(verb, self.group, self.call(direction))


@lru_cache(maxsize=4096)  # making one takes ten times as long
def _call(layer: str, direction: str, channels: int, dtype: str, eps: float) -> Call:
    return Call(layer, direction, channels, dtype, float(eps))  # 0 on one rank is 0.0 on another


class _SyncBatchNorm(torch.autograd.Function):
    """The fused path."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _remember(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, *saved = ctx.saved_tensors
        step = ctx.step
        context = ActivationContext(step.activation, weight, *saved) if saved else None
        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        kernels: Kernels
        # create_graph, where the result will be differentiated again, and batched gradients
        if torch.is_grad_enabled() or torch._C._functorch.is_batchedtensor(dy):
            stats, kernels = _known_stats(x, step), generic
            reduce_sums = _differentiable_sums(step, "backward")
        else:
            stats, kernels = step.near, kernels_for(x)
            reduce_sums = step.exchange(exchange.reduce_sums, "backward")
        with np.errstate(all="ignore"):
            dx, dweight, dbias, dz = functional.backward(
                dy, x, stats, weight, kernels, reduce_sums, need_dx, context
            )
        return (
            dx,
            _as(dweight, weight.dtype) if need_dweight else None,
            _as(dbias, ctx.bias_dtype) if need_dbias else None,
            dz if ctx.has_residual else None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        dresidual: Tensor | None,
        _: None,
    ) -> Tensor:
        # With unit weight the Jacobian with respect to x is symmetric, so forward mode is the
        # backward formula applied to the tangent.
        x, weight, *saved = ctx.saved_tensors
        step = ctx.step
        stats = _known_stats(x, step)
        dy = torch.zeros_like(x)
        if dx is not None:
            reduce_sums = _differentiable_sums(step, "tangent")
            dy = dy + functional.backward(dx, x, stats, weight, generic, reduce_sums)[0]
        if dweight is not None:
            dy = dy + generic.normalize(x, stats.mean, stats.invstd, dweight, None)
        if dbias is not None:
            dy = dy + generic._channels(dbias, x).to(dy.dtype)
        if dresidual is not None:
            dy = dy + dresidual
        if saved:
            context = ActivationContext(step.activation, weight, *saved)
            dy = generic.backward_reduce(dy, x, stats.mean, stats.invstd, context)[2]
        return dy


class _Transformable(_SyncBatchNorm):
    """The same for torch.func, which wants the two halves of forward apart. Slower: for that alone."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _remember(ctx, inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, None]:
        _refuse_batched(in_dims)
        return _Transformable.apply(*inputs), None


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, step: _Step
) -> Tensor:
    with np.errstate(all="ignore"):  # values that are not finite are data
        y, step.stats, step.near = functional.forward(
            x,
            weight,
            bias,
            step.eps,
            kernels_for(x),
            step.exchange(exchange.merge_moments, "forward"),
            residual,
            step.activation,
        )
    return y


def _remember(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    x, weight, bias, residual, ctx.step = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    saved: tuple[Any, ...] = (x, weight)
    if ctx.step.activation != Activation.NONE:
        # With a residual, only the output itself tells where it was positive.
        saved = (x, weight, bias, y if ctx.has_residual else None)
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)


class _MergeMoments(torch.autograd.Function):
    """Group mean and variance as functions of this rank's; the values are known, so forward is silent."""

    @staticmethod
    def forward(mean: Tensor, m2: Tensor, count: int, step: _Step) -> tuple[Tensor, Tensor]:
        return tuple(torch.as_tensor(v).clone() for v in step.near[:2])  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        mean, _, ctx.count, ctx.step = inputs
        ctx.total = max(ctx.step.stats.count, 1)
        ctx.rows = mean.ndim == 2  # float64: in two parts, and only their sum matters here
        mean = mean.sum(0) if ctx.rows else mean
        ctx.save_for_backward(mean, output[0])
        ctx.save_for_forward(mean, output[0])

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Any, ...]:
        mean, merged = ctx.saved_tensors
        dmean, dvar = _differentiable_sums(ctx.step, "gradient of the moments")(dmean, dvar)
        # var = (sum m2 + sum count * (mean - merged)**2) / total; merged is where its slope is zero
        dmean = (dmean + 2 * (mean - merged) * dvar) * (ctx.count / ctx.total)
        return dmean.expand(2, -1) if ctx.rows else dmean, dvar / ctx.total, None, None

    @staticmethod
    def jvp(ctx: Any, dmean: Tensor | None, dm2: Tensor | None, *_: None) -> tuple[Tensor, Tensor]:
        mean, merged = ctx.saved_tensors
        dmean = (
            torch.zeros_like(mean)
            if dmean is None
            else (dmean.sum(0) if ctx.rows else dmean) * (ctx.count / ctx.total)
        )
        dvar = 2 * (mean - merged) * dmean
        if dm2 is not None:
            dvar = dvar + dm2 / ctx.total
        return _differentiable_sums(ctx.step, "tangent of the moments")(dmean, dvar)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], mean: Tensor, m2: Tensor, count: int, step: _Step) -> Any:
        _refuse_batched(in_dims)
        return _MergeMoments.apply(mean, m2, count, step), (None, None)


class _AllReduce(torch.autograd.Function):
    """The sum over the group, of float64 values of any shape. It is its own adjoint."""

    @staticmethod
    def forward(values: Tensor, step: _Step, direction: str) -> Tensor:
        (total,) = exchange.reduce_sums(step.group, step.call(direction), values.reshape(-1))
        return transport.from_host(total, values).reshape(values.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.step, ctx.direction = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _AllReduce.apply(grad, ctx.step, f"adjoint of the {ctx.direction}"), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _AllReduce.apply(tangent, ctx.step, f"tangent of the {ctx.direction}")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], values: Tensor, step: _Step, direction: str
    ) -> tuple[Tensor, int]:
        return _AllReduce.apply(values.movedim(in_dims[0], 0), step, direction), 0


def _refuse_batched(in_dims: tuple[Any, ...]) -> None:
    """torch.func.jacrev and jacfwd batch what flows back and along, not the input."""
    if any(dim is not None for dim in in_dims):
        raise NotImplementedError(
            "vmap over the input or the parameters of a synchronized batch norm is not supported: it would "
            f"be one collective per sample{on_rank()}; call it on the whole batch"
        )


def _known_stats(x: Tensor, step: _Step) -> BatchStats:
    """The statistics of the forward pass again, as differentiable functions of ``x``."""
    count, mean, m2 = generic.local_moments(x)
    mean, var = _MergeMoments.apply(mean, m2, count, step)
    return BatchStats(mean, var, functional.invstd_of(var, step.eps), step.stats.count)


def _differentiable_sums(step: _Step, direction: str) -> Any:
    def reduce_sums(*sums: Tensor) -> tuple[Tensor, ...]:
        return _AllReduce.apply(torch.stack(sums), step, direction).unbind()

    return reduce_sums


def _as(vector: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(vector, np.ndarray):
        return vector.to(dtype)
    if dtype == torch.float32:  # NumPy converts a short vector in a fifth of torch's time
        return torch.from_numpy(vector.astype(np.float32))
    return torch.from_numpy(vector).to(dtype)


# torch.compile: the exchanges as operations that it does not look into. It would drop one whose
# result is unused, or run two equal ones once, and then ranks wait for each other for ever;
# changing a tensor that outlives the graph keeps every one of them, and in order. One for each
# direction: a graph that saved what the next forward changes would refuse its backward pass.
with torch.inference_mode(False), _disable_current_modes():  # whatever mode the first import happens in
    _FORWARD, _BACKWARD = torch.from_numpy(np.zeros(())), torch.from_numpy(np.zeros(()))


def _token(token: Tensor, x: Tensor) -> Tensor:
    return token if torch.compiler.is_compiling() else x.new_zeros(())  # meta and fake: of their own kind


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
) -> Any:
    with np.errstate(all="ignore"):
        communicator = by_handle(group)
        call = _call(communicator.name_of(layer), "forward", m2.shape[-1], dtype, eps)
        total, merged, var = exchange.merge_moments(communicator, call, count, mean, m2)
        merged, var = (transport.from_host(vector, m2) for vector in (merged, var))
    check_count(total, m2)
    # filled there, so that no device is waited for
    first_time = m2.new_full((), not _recomputing(), dtype=torch.bool)
    return m2.new_full((), total), merged, var, first_time


def _reduce_sums_op(
    sums: Tensor, token: Tensor, group: str, layer: str, direction: str, dtype: str, eps: float
) -> Tensor:
    communicator = by_handle(group)
    call = _call(communicator.name_of(layer), direction, sums.shape[-1], dtype, eps)
    (total,) = exchange.reduce_sums(communicator, call, sums.reshape(-1))
    return transport.from_host(total, sums).reshape(sums.shape)


_LIBRARY.impl("merge_moments", _merge_moments_op, "CompositeExplicitAutograd")
_LIBRARY.impl("reduce_sums", _reduce_sums_op, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mpisyncbn::merge_moments",
    lambda mean, m2, *_: _kept(
        m2.new_empty(()),
        torch.empty_like(m2),
        torch.empty_like(m2),
        m2.new_empty((), dtype=torch.bool),
    ),
)
torch.library.register_fake("mpisyncbn::reduce_sums", lambda sums, *_: torch.empty_like(sums))


def _kept(*results: Tensor) -> tuple[Tensor, ...]:
    """Results of what is being traced, which a checkpoint inside the graph is to keep (torch 2.11)."""
    meta = torch.fx.traceback.current_meta
    if "recompute" in meta:
        meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return results


@torch.ops.mpisyncbn.merge_moments.default.py_impl(_CachingTorchDispatchMode)
def _pass_by(_: Any, *args: Any) -> Any:
    """For torch 2.13, in which this mode has a checkpoint inside the graph repeat everything."""
    return torch.ops.mpisyncbn.merge_moments(*args)


class _Traced(torch.autograd.Function):
    """The composite path as torch.compile sees it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: str,
        layer: str,
        dtype: str,
    ) -> tuple[Tensor, ...]:
        first_time = []

        def merge_moments(count: int, mean: Tensor, m2: Tensor) -> tuple[Tensor, ...]:
            *merged, first = torch.ops.mpisyncbn.merge_moments(
                mean, m2, count, _token(_FORWARD, x), group, layer, dtype, eps
            )
            first_time.append(first)
            return tuple(merged)

        y, stats, _ = functional.forward(x, weight, bias, eps, generic, merge_moments)
        ctx.save_for_backward(x, weight, *stats)
        ctx.token = _token(_BACKWARD, x)  # this way, nobody asks whether another graph has changed it
        ctx.exchange = group, layer, dtype, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*stats, *first_time)
        return y, *stats, *first_time

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
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
