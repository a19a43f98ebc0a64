"""The activations that a layer may end in, for torch tensors on any device.

To add an activation, add a member here, two branches below, the member in cpu/types.h, its
branches in cpu/activation.h and cuda/activation.py, and its text in ../activations.py.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from .protocol import Array

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "NO_ACTIVATION",
    "Activation",
    "ActivationContext",
    "Kind",
    "UndoneContext",
    "activate",
    "activation_gradient",
    "input_gradient",
    "undo",
]


class Kind(IntEnum):
    """The function of an activation. Native code and Triton have the same numbers."""

    NONE = 0
    RELU = 1
    LEAKY_RELU = 2
    SILU = 3
    HARDSWISH = 4
    ELU = 5
    GELU = 6
    GELU_TANH = 7


class Activation(NamedTuple):
    """The activation that a layer ends in, as the kernels take it."""

    kind: Kind
    parameter: float = 0.0  # the slope of a leaky ReLU below 0, the alpha of an ELU

    @property
    def can_be_undone(self) -> bool:
        """Whether the input can be computed from the output."""
        return self.kind == Kind.NONE or (self.kind == Kind.LEAKY_RELU and self.parameter > 0)

    @property
    def sign_decides(self) -> bool:
        """Whether the sign of the output determines the derivative. Then no input is needed."""
        return self.kind == Kind.RELU or (self.kind == Kind.LEAKY_RELU and self.parameter >= 0)


NO_ACTIVATION = Activation(Kind.NONE)


class ActivationContext(NamedTuple):
    """The tensors that the gradient of an activation needs, beside ``x`` and the statistics.

    Without a residual the activation's input is computed again from ``x``. With one, ``y`` is given
    if the sign of the output decides, and else the residual.
    """

    activation: Activation
    weight: Array | None
    bias: Array | None
    y: Array | None = None
    residual: Array | None = None

    @property
    def undone(self) -> bool:
        """Whether the kernels get the activation's output in place of ``x``."""
        return False

    @property
    def stores_dz(self) -> bool:
        """Whether ``backward_reduce`` stores ``dz``, the gradient of the activation's input.

        A residual has that gradient. Without one, ``backward_elementwise`` computes it again,
        unless the module of kernels stores it anyway.
        """
        return self.y is not None or self.residual is not None


class UndoneContext(ActivationContext):
    """The context of kernels that get the output of a leaky ReLU in place of ``x``.

    The kernels compute the activation's input from it, and use that in place of ``x``. The ``mean``
    is then that of the activation's input: the bias.
    """

    @property
    def undone(self) -> bool:
        return True


def recomputed_activation(context: ActivationContext | None) -> tuple[Activation, Array | None]:
    """The activation whose gradient ``backward_elementwise`` has to take, and the bias for that."""
    if context is None or context.stores_dz:
        return NO_ACTIVATION, None
    return context.activation, context.bias


def undo(y: Tensor, activation: Activation) -> Tensor:
    """The input of a leaky ReLU from its output."""
    return y.where(y > 0, y / activation.parameter)


def activate(z: Tensor, activation: Activation, in_place: bool = False) -> Tensor:
    """The output of an activation, by torch's own functions."""
    kind, parameter = activation
    if kind == Kind.NONE:
        return z
    if kind == Kind.RELU:
        return z.relu_() if in_place else z.relu()
    import torch.nn.functional as F

    if kind == Kind.LEAKY_RELU:
        return F.leaky_relu(z, parameter, in_place)
    if kind == Kind.SILU:
        return F.silu(z, in_place)
    if kind == Kind.HARDSWISH:
        return F.hardswish(z, in_place)
    if kind == Kind.ELU:
        return F.elu(z, parameter, in_place)
    return F.gelu(z, approximate="tanh" if kind == Kind.GELU_TANH else "none")


def activation_gradient(dy: Tensor, z: Tensor, activation: Activation) -> Tensor:
    """The gradient of an activation's input ``z``, from ``dy``, the gradient of its output.

    ``z`` may be the output if ``activation.sign_decides``. The result can be differentiated any
    number of times.
    """
    kind, parameter = activation
    if kind == Kind.RELU:
        return dy.masked_fill(z <= 0, 0)
    if kind == Kind.LEAKY_RELU:
        return dy.where(z > 0, dy * parameter)
    if kind == Kind.ELU:
        return dy.where(z > 0, dy * (parameter * z.clamp(max=0).exp()))
    if kind == Kind.NONE:
        return dy
    return dy * _derivative(z, kind)


def input_gradient(
    normalize: Callable[..., Tensor],
    dy: Tensor,
    x: Tensor,
    mean: Array,
    invstd: Array,
    context: ActivationContext,
) -> Tensor:
    """The gradient of the activation's input, in the dtype of ``dy``. ``normalize`` is a kernel."""
    activation, weight, bias, z, residual = context
    if z is None:
        wide = x if x.dtype.itemsize == 8 else x.float()
        residual = None if residual is None else residual.to(wide.dtype)
        z = normalize(wide, mean, invstd, weight, bias, residual)
    return activation_gradient(dy.to(z.dtype), z, activation).to(dy.dtype)


def _derivative(z: Tensor, kind: Kind) -> Tensor:
    """The derivative of a smooth activation, or of hardswish, at ``z``."""
    if kind == Kind.SILU:
        sigmoid = z.sigmoid()
        return sigmoid * (1 + z * (1 - sigmoid))
    if kind == Kind.HARDSWISH:
        return (z / 3 + 0.5).masked_fill(z <= -3, 0).masked_fill(z >= 3, 1)
    if kind == Kind.GELU:
        density = (z.square() * -0.5).exp() * math.sqrt(0.5 / math.pi)
        return 0.5 * (1 + (z * math.sqrt(0.5)).erf()) + z * density
    # Hendrycks and Gimpel 2016: z * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z**3))) / 2
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = (scale * (z + cubic * z**3)).tanh()
    return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh.square()) * scale * (1 + 3 * cubic * z.square())
