"""The activations and their gradients, for a tile in Triton.

To add an activation, add a constant, and a branch in each function.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["NONE", "RELU", "activate", "activation_gradient"]

NONE, RELU = tl.constexpr(0), tl.constexpr(1)  # as in activation.py


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The output of an activation. NaN stays NaN, as in torch's ReLU."""
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    return z


@triton.jit
def activation_gradient(dy, z, ACTIVATION: tl.constexpr):
    """The gradient of an activation's input, from ``dy``, the gradient of its output.

    ``z`` is its input, or its output if the input is not known.
    """
    if ACTIVATION == RELU:
        dy = tl.where(z <= 0, 0.0, dy)
    return dy
