"""Batch norm in evaluation, with the running statistics and without other ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import AnyActivation, activation_of
from ..arguments import check_count
from ..kernels import Activation, has_float64, where_true
from ..kernels.activation import activate
from ..torch_versions import is_exporting

__all__ = ["add_residual_and_activation", "evaluate"]


def evaluate(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: AnyActivation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalize ``x`` with the running statistics, or those of this rank's batch if there are none.

    The gradient uses the running statistics as they are now, even if they change before the
    backward. Not collective.
    """
    act = activation_of(activation)
    if running_mean is not None and running_var is not None and _is_recorded(x, weight, bias):
        # Autograd keeps references, and a training step before the backward changes the tensors in
        # place. torch's own layer then uses the new values silently, or raises if it is compiled.
        if torch.compiler.is_compiling():
            running_mean, running_var = torch.ops.mpisyncbn.keep(running_mean, running_var)
        else:
            running_mean, running_var = running_mean.clone(), running_var.clone()
    x = where_true(x, mask)
    if mask is not None and running_mean is None:
        y = _normalize_by_batch(x, weight, bias, eps, mask)
    else:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, running_mean is None, 0.0, eps)
    return add_residual_and_activation(where_true(y, mask), act, residual, mask)


def _normalize_by_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, mask: Tensor
) -> Tensor:
    """Normalize ``x`` by torch's operations with this rank's statistics where the mask is true."""
    count = mask.sum()
    if not (x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting()):
        check_count(int(count), x)  # while a graph is traced, no value can be read
    axes, values = (0, *range(2, x.ndim)), count + (count == 0)
    wide = x.to(torch.float64 if has_float64(x) else torch.float32)
    xmu = where_true(wide - wide.sum(axes, keepdim=True) / values, mask)
    y = xmu * (xmu.square().sum(axes, keepdim=True) / values + eps).rsqrt()
    view = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.view(view)
    return (y if bias is None else y + bias.view(view)).to(x.dtype)


def _is_recorded(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled() or torch.jit.is_tracing() or is_exporting():
        return False  # a graph for other programs must hold only torch's operations
    return any(each is not None and each.requires_grad for each in tensors)


def add_residual_and_activation(
    y: Tensor, activation: Activation, residual: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """Add a residual and apply an activation, each by an operation of its own.

    Where the mask is false, ``y`` is 0 and stays 0: each activation maps 0 to 0.
    """
    if residual is not None:
        y = y + where_true(residual, mask)
    return activate(y, activation)


# The compiler does not look into this operation. It looks into clone(), and may repeat that in the
# backward, when the values have changed.
_LIBRARY = torch.library.Library("mpisyncbn", "FRAGMENT")
_LIBRARY.define("keep(Tensor mean, Tensor var) -> (Tensor, Tensor)")
_LIBRARY.impl("keep", lambda mean, var: (mean.clone(), var.clone()), "CompositeExplicitAutograd")
torch.library.register_fake(
    "mpisyncbn::keep", lambda mean, var: (torch.empty_like(mean), torch.empty_like(var))
)
