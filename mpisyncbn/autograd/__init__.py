"""Synchronized batch norm as a torch operation, with any number of derivatives in both modes.

Three paths lead through the same algorithm (functional.py). They send the same messages in the same
order, so ranks may take different paths:

- fused.py has kernels for the place where the data lives, and the first derivatives for training.
  enqueued.py does its work under the stream transport.
- composite.py has differentiable torch operations and exchanges, for all other derivatives.
- compiled.py is for torch.compile, which fuses torch operations but does not look into exchanges.

evaluation.py needs no other rank.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .. import profiling, torch_versions
from ..activations import AnyActivation, activation_of
from ..arguments import (
    UNNAMED,
    check_arguments,
    check_count,
    check_mask,
    check_memory_efficient,
    check_residual,
    check_tensor,
)
from ..batch_stats import NOT_TO_RECORD, BatchStats
from ..comm.communicator import Communicator
from ..comm.groups import AnyGroup, resolve
from ..errors import MPISyncBNError, on_rank
from ..fingerprint import layer_dtype
from ..kernels import describe, native
from ..kernels.protocol import Running
from ..running_stats import record_batch
from . import compiled, fused
from .evaluation import add_residual_and_activation, evaluate
from .layer_context import LayerContext, is_recomputing

__all__ = ["batch_norm", "check_tensors", "sync_batch_norm"]

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
    process_group: AnyGroup = None,
    *,
    activation: AnyActivation = None,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` over the batch of all ranks of a group.

    Args:
        input: ``(N, C, *)``, at least 2-D; float32, float64, bfloat16 or float16. N may differ
            between ranks, and be 0.
        running_mean, running_var: of length C, updated in place while training; or None.
        weight, bias: of length C, or None. With half-precision input they may be float32.
        training: if False, normalize with the running statistics, without communication.
        momentum: weight of this batch in the running statistics, from 0 to 1: a number, or a 0-d
            tensor in host memory or on their device.
        eps: added to the variance, at least 0.
        process_group: the ranks to normalize over: an mpi4py communicator, a Communicator, a
            process group of torch.distributed, or None for the world.
        activation: applied to the output, in the same passes over memory, forward and
            backward: "relu", "leaky_relu", "silu", "hardswish", "elu" or "gelu", with torch's
            defaults; "leaky_relu(0.1)", "elu(0.5)" or "gelu(tanh)"; a module of torch.nn that does
            the same, such as ``nn.LeakyReLU(0.1)``; or None.
        residual: like the input; added before the activation, in the same passes; or None.
        memory_efficient: if True, autograd keeps the output in place of the input, as
            ``SyncBatchNorm`` says.
        mask: boolean, on the device of the input, of its shape but with one channel: ``(N, 1, *)``;
            or None. Statistics and gradients are those of the values where it is true. Elsewhere
            ``y`` and the gradients of input and residual are 0, even if the input is NaN there
            (docs/guides/masks.md).

    Returns:
        ``y``, of the input's shape, dtype and memory format.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype, device or range.
        TypeError: ``momentum`` is None in training: only a layer counts its batches.
        ValueError: ``activation`` is another text or module, or has hooks or its own ``forward``.
        ValueError: ``memory_efficient`` with a residual or an activation that cannot be undone.
        ValueError: on every rank, if the group has a single value per channel.
        CollectiveMismatchError: on every rank, if the ranks were in different layers or calls.
        MPISyncBNError: the group is the world, and torch.distributed or a launcher has more ranks.

    Collective while training, forward and backward: every rank of the group must call.
    """
    check_tensor(input)
    if memory_efficient:
        check_memory_efficient(activation, residual)
    if not training:
        check_arguments(input, weight, bias, running_mean, running_var, momentum=momentum, eps=eps)
        check_residual(residual, input)
        check_mask(mask, input)
        if running_mean is None:
            raise ValueError(
                f"expected running_mean and running_var in evaluation, got neither{on_rank()}: pass them, "
                "or set training to True for the statistics of the batch"
            )
        return evaluate(input, running_mean, running_var, weight, bias, eps, activation, residual, mask)
    if momentum is None:
        raise TypeError(
            f"expected momentum to be a number, got None{on_rank()}: only a layer counts the batches that a "
            "cumulative average needs"
        )
    vectors, how = (running_mean, running_var, weight, bias), (activation, residual, memory_efficient, mask)
    y, stats, device_stats = batch_norm(input, *vectors, momentum, eps, process_group, UNNAMED, *how)
    if running_mean is not None and running_var is not None:
        record_batch(running_mean, running_var, None, stats, momentum, device_stats)
    return y


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor | None,
    eps: float,
    process_group: AnyGroup,
    layer: str,
    activation: AnyActivation = None,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, BatchStats, BatchStats]:
    """Run a layer in training mode.

    Returns ``y``, the statistics of the batch on the host, and the same on the device of ``x``. If
    a checkpoint repeats the call, or running statistics have taken the batch already, their count
    is 0, so that the batch is not recorded twice.
    ``layer`` is a name, or a key for ``Communicator.name_of``. The caller has made the checks for
    ``memory_efficient``. Collective, forward and backward: every rank of the group must call.
    """
    if not torch_versions.COMPILES and torch.compiler.is_compiling():
        torch_versions.refuse_to_compile()
    compiling = _is_traced(x)
    tensors = x, weight, bias, running_mean, running_var
    description = None if compiling or not x.is_cuda else describe(*tensors, num_batches_tracked, residual)
    if compiling:
        check_arguments(*tensors, momentum=momentum, eps=eps, layer=layer)
    else:
        check_tensors(*tensors, momentum, eps, layer, description)
    if residual is not None:
        check_residual(residual, x, layer)
    if mask is not None:
        check_mask(mask, x, layer)
    act = activation_of(activation)  # raises before anything is sent
    dtype = (_accepted.get(description) if description else "") or layer_dtype(x, weight, bias, running_mean)
    if compiling:
        # A graph cannot hold an object, so it names the group by a string.
        y, stats = compiled.apply(x, weight, bias, mask, eps, _graph_key(process_group), layer, dtype)
        # The compiler fuses these with the layer.
        return add_residual_and_activation(y, act, residual, mask), stats, stats
    group = resolve(process_group)
    name, recomputing = group.name_of(layer), is_recomputing()
    context = LayerContext(group, name, x.shape[1], dtype, eps, act, memory_efficient)
    if group.ready().stream is not None:
        context.description = description
        if not (running_mean is None or running_var is None or recomputing) and type(momentum) is float:
            context.running = Running(running_mean, running_var, num_batches_tracked, momentum)
    y = fused.apply(x, weight, bias, residual, mask, context)
    if context.enqueued is not None:
        is_recorded = running_mean is None or context.enqueued.recorded or recomputing
        stats = NOT_TO_RECORD if is_recorded else context.enqueued.stats()
        return y, stats, stats
    check_count(context.stats.count, x, layer)
    return y, context.stats._replace(count=0) if recomputing else context.stats, context.device_stats


def check_tensors(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor | None,
    eps: float,
    layer: str | None,
    description: Hashable | None = None,
) -> None:
    """Do ``check_arguments`` for tensors with values; in the usual case in a tenth of its time.

    For tensors on a GPU, ``description`` is what ``describe`` returned for them, and maybe for more
    tensors.
    """
    tensors, native_code = (x, weight, bias, running_mean, running_var), native()
    try:
        numbers_fit = (
            eps.__class__ is float
            and 0.0 <= eps < math.inf
            and momentum.__class__ is float
            and 0.0 <= momentum <= 1.0
        )
        if numbers_fit and (
            description in _accepted
            if x.is_cuda
            else native_code is not None and native_code.passes_fast_check(*tensors)
        ):
            return
    except (AttributeError, RuntimeError):  # nested tensors have no shape; torch 2.6 raises the latter
        pass
    check_arguments(*tensors, momentum=momentum, eps=eps, layer=layer)
    if description is not None:
        if len(_accepted) >= 4096:  # a model has fewer: its shapes have come and gone
            _accepted.clear()
        _accepted[description] = layer_dtype(x, weight, bias, running_mean)


# Descriptions of tensors on GPUs that check_arguments has accepted, and the layer's dtype. A
# compiler must not see this table, which other calls change.
_accepted: dict[Hashable, str] = {}


def _is_traced(x: Tensor) -> bool:
    """Whether a graph is being made of the call, or ``x`` has no values.

    Raises MPISyncBNError if torch.func differentiates inside the graph.
    """
    fake = x.is_meta or isinstance(x, (FakeTensor, FunctionalTensor))
    if not (fake or torch.compiler.is_compiling() or _is_recording()):
        return False
    if torch._C._are_functorch_transforms_active():
        raise MPISyncBNError(
            "expected no transform of torch.func (grad, jvp, vmap, linearize) inside a graph with a "
            f"synchronized layer that trains{on_rank()}: transform the compiled function instead, as in "
            "torch.func.grad(torch.compile(f)), or do not compile it"
        )
    return True


def _is_recording() -> bool:
    """Whether make_fx records the operations of torch, of which a fused layer uses none."""
    key = torch._C._TorchDispatchModeKey.PROXY
    mode = torch._C._get_dispatch_mode(key) or torch._ops._get_dispatch_mode_pre_dispatch(key)
    return mode is not None


def _graph_key(process_group: AnyGroup) -> str:
    if process_group is None:
        return ""
    if not isinstance(process_group, Communicator) and torch.compiler.is_compiling():
        raise TypeError(
            "expected process_group to be an mpisyncbn.Communicator in a compiled function, got an mpi4py "
            "communicator: make it one outside, mpisyncbn.Communicator(comm)"
        )
    return resolve(process_group).graph_key
