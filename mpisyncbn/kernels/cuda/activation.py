"""The activations and their gradients, for a tile in Triton.

Another activation is one more constant, and one more branch in each function.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["NONE", "RELU", "activate", "activation_gradient"]

NONE, RELU = tl.constexpr(0), tl.constexpr(1)  # as in activation.py


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The output of an activation. NaN passes, as it does through torch's ReLU."""
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    return z


@triton.jit
def activation_gradient(dy, z, ACTIVATION: tl.constexpr):
    """The gradient of an activation's input, from ``dy``, that of its output.

    ``z`` is its input or, where that is not known, its output.
    """
    if ACTIVATION == RELU:
        dy = tl.where(z <= 0, 0.0, dy)
    return dy
