"""Checks of what a caller may pass, before anything is computed, sent or changed.

They raise ValueError or TypeError, as torch does. The message says what was expected, what came, on
which rank, and the cure.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..comm import transport
from ..errors import on_rank
from ..kernels import Array, loaded_torch
from .arrays import COUNTING, FLOATING, check_array, check_kind, dtype_name, on_device
from .statistics import check_stats

if TYPE_CHECKING:
    from ..activations import AnyActivation

__all__ = [
    "LONGEST_TIMEOUT",
    "UNNAMED",
    "check_arguments",
    "check_count",
    "check_gradient",
    "check_mask",
    "check_memory_efficient",
    "check_module",
    "check_num_batches_tracked",
    "check_residual",
    "check_running",
    "check_stats",
    "check_tensor",
    "check_timeout",
    "in_layer",
]

_HALVES = ("float16", "bfloat16")
LONGEST_TIMEOUT = 100 * 365 * 24 * 3600.0  # seconds: as good as for ever, and a timedelta can hold it
UNNAMED = "a function call"  # in place of the name of a layer
_NUMBER = (int, float, np.integer, np.floating)


def check_arguments(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    momentum: float | Array | None = 0.1,
    eps: float = 1e-5,
    layer: str | None = None,
) -> None:
    """Check the arguments of a forward pass. Errors name the ``layer``, if it has a name."""
    check_array("input", x)
    if x.ndim < 2:
        raise ValueError(
            f"expected at least 2D input, (N, C, *), got {x.ndim}D input{in_layer(layer)}: "
            "one sample alone is x[None]"
        )
    channels = x.shape[1]
    if channels == 0:
        raise ValueError(
            f"expected a non-zero number of input channels, got shape {tuple(x.shape)}{in_layer(layer)}: "
            "dimension 1 is that of the channels"
        )
    name = dtype_name(x.dtype)
    if name not in FLOATING:
        raise TypeError(
            f"expected input of dtype {', '.join(FLOATING)}, got {name}{in_layer(layer)}: convert it first"
        )
    _check_number("eps", eps, "to be finite and at least 0", math.inf, layer)
    if momentum is not None:
        _check_momentum(momentum, "from 0 to 1, or None", x, layer)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"expected running_mean and running_var both or neither, got no {missing}{in_layer(layer)}: pass "
            "the other one too, or none"
        )
    given = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check_vectors({label: vector for label, vector in given.items() if vector is not None}, x, layer)


def _check_vectors(vectors: dict[str, Array], x: Array, layer: str | None) -> None:
    """Check vectors, by their names in errors, that have one value for each channel of ``x``."""
    channels = x.shape[1]
    first = None
    for label, vector in vectors.items():
        check_kind(label, vector, "the input", x)
        if vector.ndim != 1 or vector.shape[0] != channels:
            raise ValueError(
                f"expected {label} of shape ({channels},), one value per channel of the input "
                f"{tuple(x.shape)}, got {tuple(vector.shape)}{in_layer(layer)}: an input is (N, C, *), with "
                "the channels in dimension 1"
            )
        if getattr(vector, "device", None) != getattr(x, "device", None):
            cure = "move the module or the input with .to(device)"
            if getattr(vector, "is_meta", False):  # .to() refuses it
                cure = "give the module values, .to_empty(device=...) and .reset_parameters(), or load them"
            raise ValueError(
                f"expected {label} on the input's device, {x.device}, got {vector.device}{in_layer(layer)}: "
                f"{cure}"
            )
        first = vector.dtype if first is None else first
        if vector.dtype != first or (first != x.dtype and not _is_mixed(dtype_name(x.dtype), first)):
            raise TypeError(_dtype_problem(label, first, {"input": x, **vectors}, layer))


def _dtype_problem(label: str, first: object, arrays: dict[str, Array], layer: str | None) -> str:
    """The error text for an array, ``label``, whose dtype does not fit. It lists all dtypes."""
    name = dtype_name(arrays["input"].dtype)
    possible = [name, "float32"] if name in _HALVES else [name]
    wanted = possible if arrays[label].dtype == first else [dtype_name(first)]
    found = ", ".join(f"{each} {dtype_name(array.dtype)}" for each, array in arrays.items())
    cure = ".to(torch.{})" if hasattr(arrays["input"], "is_cpu") else ".astype('{}')"
    return (
        f"expected {label} of dtype {' or '.join(wanted)}, the same for all, got "
        f"{dtype_name(arrays[label].dtype)}{in_layer(layer)}. They are: {found}. Convert the module, or "
        f"the arrays, with {' or '.join(cure.format(each) for each in possible)}"
    )


def in_layer(layer: str | None) -> str:
    """The end of a message: `` in layer bn.1 (on rank 2 of 4)``, or without a layer's name."""
    named = layer is not None and not layer.startswith("#") and layer != UNNAMED
    return f" in layer {layer}{on_rank()}" if named else on_rank()


def check_tensor(x: object) -> None:
    """Check the input of functions that take torch tensors alone."""
    if not isinstance(x, loaded_torch().Tensor):
        raise TypeError(
            f"expected input to be a torch tensor, got {type(x).__name__}{on_rank()}: for arrays there is "
            "mpisyncbn.functional"
        )


def check_residual(residual: Array | None, x: Array, layer: str | None = None) -> None:
    """Check the residual that is added to the normalized tensor ``x``."""
    if residual is None:
        return
    if not isinstance(residual, loaded_torch().Tensor):
        got = f"{type(residual).__name__}{in_layer(layer)}"
        raise TypeError(f"expected residual to be a tensor, got {got}: convert it first")
    check_array("residual", residual)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"expected residual like the input, {tuple(x.shape)} {x.dtype} on {x.device}, got "
            f"{tuple(residual.shape)} {residual.dtype} on {residual.device}{in_layer(layer)}: "
            "convert or expand it first"
        )


def check_memory_efficient(
    activation: AnyActivation, residual: Array | None = None, layer: str | None = None
) -> None:
    """Refuse a residual, and an activation that cannot be undone, with ValueError."""
    if residual is not None:
        raise ValueError(
            f"expected no residual with memory_efficient, got one{in_layer(layer)}: the output then does not "
            "tell the input. Set memory_efficient to False"
        )
    from ..activations import activation_of, name_of  # they import torch

    if not activation_of(activation).can_be_undone:
        raise ValueError(
            "expected activation to be None or a leaky_relu with a slope above 0 with memory_efficient, got "
            f"{name_of(activation)!r}{in_layer(layer)}: its output does not tell its input. Set "
            "memory_efficient to False"
        )


def check_mask(mask: Array | None, x: Array, layer: str | None = None) -> None:
    """Check the mask of the input ``x``, which has been checked."""
    if mask is None:
        return
    check_kind("mask", mask, "the input", x)
    if dtype_name(mask.dtype) != "bool":
        raise ValueError(
            f"expected mask of dtype bool, got {dtype_name(mask.dtype)}{in_layer(layer)}: it is True where "
            "there is data. mask != 0 makes a boolean mask of numbers"
        )
    shape, found = (x.shape[0], 1, *x.shape[2:]), tuple(mask.shape)
    if found != shape:
        raise ValueError(
            f"expected mask of shape {shape}, that of the input {tuple(x.shape)} with one channel, got "
            f"{found}, of {len(found)} dimensions{in_layer(layer)}: nothing is broadcast, .reshape() or "
            ".expand() it first"
        )
    if on_device(mask) != on_device(x):
        raise ValueError(
            f"expected mask{on_device(x)}, where the input is, got one{on_device(mask)}{in_layer(layer)}: "
            "move it with .to(input.device)"
        )


def check_num_batches_tracked(batches: Array) -> None:
    """Check ``num_batches_tracked``: a tensor to which 1 can be added in place, or None."""
    torch = loaded_torch()
    if batches is None or (batches.__class__ is torch.Tensor and batches.dtype is torch.int64):
        return
    if not isinstance(batches, torch.Tensor) or dtype_name(batches.dtype) not in COUNTING:
        found = batches.dtype if isinstance(batches, torch.Tensor) else type(batches).__name__
        raise TypeError(
            f"expected num_batches_tracked to be a tensor of whole numbers, got {found}{on_rank()}: "
            "convert it first"
        )
    check_array("num_batches_tracked", batches)


def check_gradient(dy: Array, x: Array) -> None:
    """Check the gradient of the output of ``x``."""
    check_kind("dy", dy, "the input", x)
    if dy.shape != x.shape or dy.dtype != x.dtype or on_device(dy) != on_device(x):
        raise ValueError(
            f"expected dy like x, {tuple(x.shape)} {x.dtype}{on_device(x)}, got {tuple(dy.shape)} "
            f"{dy.dtype}{on_device(dy)}{on_rank()}: convert or expand it first"
        )


def check_running(running_mean: Array, running_var: Array, momentum: float | Array) -> None:
    """Check running statistics that are to be updated."""
    check_array("running_mean", running_mean)
    check_kind("running_var", running_var, "running_mean", running_mean)
    if (
        running_var.shape != running_mean.shape
        or running_var.dtype != running_mean.dtype
        or running_mean.ndim != 1
        or dtype_name(running_mean.dtype) not in FLOATING
    ):
        raise ValueError(
            "expected running_mean and running_var to be floating point, of one length, got "
            f"{dtype_name(running_mean.dtype)} of shape {tuple(running_mean.shape)} and "
            f"{dtype_name(running_var.dtype)} of shape {tuple(running_var.shape)}{on_rank()}: convert "
            "them first"
        )
    _check_momentum(momentum, "from 0 to 1, or a 0-d tensor", running_mean)


def check_count(count: int, x: Array, layer: str | None = None) -> None:
    """Raise on every rank if the group has one value per channel: it has no variance."""
    if isinstance(count, int) and count == 1:  # else the native code of the stream transport checks it
        raise ValueError(one_value_message(layer, f"1, with input of shape {tuple(x.shape)}"))


def one_value_message(layer: str | None, got: str = "1") -> str:
    """Return the error message for a group with one value per channel."""
    return (
        f"expected more than 1 value per channel over the whole group when training, got {got}"
        f"{in_layer(layer)}: use a larger batch or eval mode"
    )


def check_module(module: object) -> None:
    """Check that ``module`` is a module of torch."""
    if not isinstance(module, loaded_torch().nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}{on_rank()}")


def check_timeout(timeout: object) -> None:
    """Check a timeout of a process group."""
    if not hasattr(timeout, "total_seconds"):
        raise TypeError(
            f"expected timeout to be a datetime.timedelta, got {type(timeout).__name__}{on_rank()}: pass "
            "timedelta(seconds=...)"
        )
    if not 0 < timeout.total_seconds() <= LONGEST_TIMEOUT:  # torch makes a negative one of timedelta.max
        raise ValueError(
            f"expected a timeout of more than 0 and at most 100 years, got {timeout}{on_rank()}: "
            "timedelta(days=36500) is as good as no limit"
        )


def _check_momentum(momentum: float | Array, expected: str, like: Array, layer: str | None = None) -> None:
    """Check a number, or a 0-d array. A value on a device is not read."""
    if isinstance(momentum, _NUMBER) or getattr(momentum, "ndim", None) != 0:
        _check_number("momentum", momentum, expected, 1.0, layer)
        return
    check_kind("momentum", momentum, "the other arguments", like)
    if dtype_name(momentum.dtype) not in FLOATING:
        raise TypeError(
            f"expected momentum to be floating point, got {momentum.dtype}{in_layer(layer)}: pass a float"
        )
    if getattr(momentum, "requires_grad", False):
        raise TypeError(
            f"expected momentum without a gradient, got a tensor that requires one{in_layer(layer)}: "
            "pass momentum.detach()"
        )
    if transport.is_readable_now(momentum):
        _check_number("momentum", float(momentum), expected, 1.0, layer)
    elif on_device(momentum) not in (on_device(like), " on cpu"):
        where = "" if transport.on_host(like) else f", or{on_device(like)}"
        raise ValueError(
            f"expected momentum in host memory{where}, got a tensor{on_device(momentum)}{in_layer(layer)}: "
            "move it there, momentum.cpu()"
        )


def _check_number(label: str, value: object, expected: str, limit: float, layer: str | None) -> None:
    if not isinstance(value, _NUMBER):
        raise TypeError(f"expected {label} {expected}, got {type(value).__name__}{in_layer(layer)}")
    if not 0.0 <= value <= limit or value == math.inf:
        raise ValueError(f"expected {label} {expected}, got {value}{in_layer(layer)}")


def _is_mixed(name: str, parameters: object) -> bool:
    return name in _HALVES and dtype_name(parameters) == "float32"
