"""The activations that a layer may end in, for arrays of any kind.

Another activation is one more member, name and branch here, and one more branch in cpu/activation.h and in
cuda/activation.py.
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
    """The activation of a public name, as ``arguments.check_activation`` lets it pass."""
    return ACTIVATIONS[name]


class ActivationContext(NamedTuple):
    """The tensors that the gradient of an activation needs, beside ``x`` and the statistics."""

    activation: Activation
    weight: Array | None
    bias: Array | None
    y: Array | None  # the output, where a residual was added; None: the input is computed again from x


def recomputed_activation(context: ActivationContext | None) -> tuple[Activation, Array | None]:
    """The activation whose gradient ``backward_elementwise`` still has to take, and the bias for that.

    ``Activation.NONE`` and None where there is none, or ``backward_reduce`` has taken it.
    """
    if context is None or context.y is not None:
        return Activation.NONE, None
    return context.activation, context.bias


def activate(z: Array, activation: Activation, in_place: bool = False) -> Array:
    """The output of an activation. ``in_place`` is for torch tensors alone."""
    if activation == Activation.RELU:
        if in_place:
            return z.relu_()
        return z.relu() if hasattr(z, "relu") else np.maximum(z, 0)
    return z


def activation_gradient(dy: Array, z: Array, activation: Activation) -> Array:
    """The gradient of an activation's input, from ``dy``, that of its output.

    ``z`` is its input or, where that is not known, its output.
    """
    if activation == Activation.RELU:
        if hasattr(dy, "masked_fill"):
            return dy.masked_fill(z <= 0, 0)
        return np.where(z <= 0, dy.dtype.type(0), dy)
    return dy
