"""The activations and their gradients, for a tile in Triton.

To add an activation, add a constant, and a branch in each function.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["NONE", "activate", "activation_gradient"]

NONE, RELU = tl.constexpr(0), tl.constexpr(1)  # as in ../activation.py
LEAKY_RELU, SILU = tl.constexpr(2), tl.constexpr(3)
HARDSWISH, ELU = tl.constexpr(4), tl.constexpr(5)
GELU, GELU_TANH = tl.constexpr(6), tl.constexpr(7)


@triton.jit
def activate(z, KIND: tl.constexpr, PARAMETER: tl.constexpr):
    """The output of an activation. NaN stays NaN, as in torch."""
    if KIND == RELU:
        z = tl.where(z <= 0, 0.0, z)
    if KIND == LEAKY_RELU:
        z = tl.where(z > 0, z, z * PARAMETER)
    if KIND == SILU:
        z = z * _sigmoid(z)
    if KIND == HARDSWISH:
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) / 6))
    if KIND == ELU:
        z = tl.where(z > 0, z, _expm1(z) * PARAMETER)
    if KIND == GELU:
        z = z * _normal_distribution(z)
    if KIND == GELU_TANH:
        z = z * _sigmoid(_gelu_tanh_argument(z))
    return z


@triton.jit
def activation_gradient(dy, z, KIND: tl.constexpr, PARAMETER: tl.constexpr):
    """The gradient of an activation's input ``z``, from ``dy``, the gradient of its output.

    ``z`` may be the output if only its sign matters, as with ReLU.
    """
    if KIND == RELU:
        dy = tl.where(z <= 0, 0.0, dy)
    if KIND == LEAKY_RELU:
        dy = tl.where(z > 0, dy, dy * PARAMETER)
    if KIND == SILU:
        sigmoid = _sigmoid(z)
        dy = dy * (sigmoid * (1 + z * (1 - sigmoid)))
    if KIND == HARDSWISH:
        dy = tl.where(z <= -3, 0.0, tl.where(z >= 3, dy, dy * (z / 3 + 0.5)))
    if KIND == ELU:
        dy = tl.where(z > 0, dy, dy * (tl.exp(tl.where(z > 0, 0.0, z)) * PARAMETER))
    if KIND == GELU:
        dy = dy * (_normal_distribution(z) + z * (tl.exp(z * z * -0.5) * 0.3989422804014327))
    if KIND == GELU_TANH:
        sigmoid = _sigmoid(_gelu_tanh_argument(z))
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)
        dy = dy * (sigmoid + z * sigmoid * (1 - sigmoid) * slope)
    return dy


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _normal_distribution(z):
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_tanh_argument(z):
    """The ``t`` with ``sigmoid(t) = (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z**3))) / 2``."""
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)


@triton.jit
def _expm1(z):
    """``exp(z) - 1`` for ``z <= 0``: near 0 by a series, since the difference would lose digits."""
    late = 1 / 720 + z * (1 / 5040 + z * (1 / 40320 + z * (1 / 362880 + z / 3628800)))
    series = z * (1 + z * (1 / 2 + z * (1 / 6 + z * (1 / 24 + z * (1 / 120 + z * late)))))
    return tl.where(z > -0.1, series, tl.exp(tl.where(z > 0, 0.0, z)) - 1)
