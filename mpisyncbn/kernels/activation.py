"""The activations that a layer may end in, for arrays of any kind.

To add an activation, add a member, a name and two branches here, the member in cpu/types.h, and
its branches in cpu/activation.h and cuda/activation.py.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from .protocol import Array

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ActivationContext",
    "activate",
    "activation_gradient",
    "activation_named",
    "recomputed_activation",
]


class Activation(IntEnum):
    """The activation that a layer ends in. Native code and Triton have the same numbers."""

    NONE = 0
    RELU = 1


ACTIVATIONS = {"relu": Activation.RELU, None: Activation.NONE}  # by public name


def activation_named(name: str | None) -> Activation:
    """The activation with a public name, which ``arguments.check_activation`` has checked."""
    return ACTIVATIONS[name]


class ActivationContext(NamedTuple):
    """The tensors that the gradient of an activation needs, beside ``x`` and the statistics."""

    activation: Activation
    weight: Array | None
    bias: Array | None
    y: Array | None  # the output, if a residual was added; None: the input is computed again from x


def recomputed_activation(context: ActivationContext | None) -> tuple[Activation, Array | None]:
    """The activation whose gradient ``backward_elementwise`` has to take, and the bias for that.

    They are ``Activation.NONE`` and None if the layer has no activation, or if ``backward_reduce``
    has taken its gradient already.
    """
    if context is None or context.y is not None:
        return Activation.NONE, None
    return context.activation, context.bias


def activate(z: Array, activation: Activation, in_place: bool = False) -> Array:
    """The output of an activation. ``in_place`` is only for torch tensors."""
    if activation == Activation.RELU:
        if in_place:
            return z.relu_()
        return z.relu() if hasattr(z, "relu") else np.maximum(z, 0)
    return z


def activation_gradient(dy: Array, z: Array, activation: Activation) -> Array:
    """The gradient of an activation's input, from ``dy``, the gradient of its output.

    ``z`` is its input, or its output if the input is not known.
    """
    if activation == Activation.RELU:
        if hasattr(dy, "masked_fill"):
            return dy.masked_fill(z <= 0, 0)
        return np.where(z <= 0, dy.dtype.type(0), dy)
    return dy
