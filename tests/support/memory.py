"""A memory-efficient layer and a plain one, their gradients, and the inputs that they keep."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mpisyncbn import SyncBatchNorm

ACTIVATIONS = [None, "leaky_relu", "leaky_relu(3.0)"]


def layers(channels=6, dtype=torch.float32, activation=None, weight=None, bias=None, **options):
    """A memory-efficient layer and a plain one with the same parameters and options."""
    efficient = SyncBatchNorm(channels, activation=activation, dtype=dtype, memory_efficient=True, **options)
    with torch.no_grad():
        for vector, values in ((efficient.weight, weight), (efficient.bias, bias)):
            if values is not None:
                vector.copy_(torch.as_tensor(values))
    plain = copy.deepcopy(efficient)
    plain.memory_efficient = False
    return efficient, plain


def gradients(layer, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output, and the gradients of x, weight and bias. Collective."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def kept(y: Tensor) -> list[int] | None:
    """The channels whose input was saved beside the output; None if the whole input was saved."""
    chosen = y.grad_fn.kept_channels
    return None if chosen is None else chosen.tolist()


def error_by_channel(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value of its channel."""
    over = [d for d in range(actual.ndim) if d != 1]
    scale = expected.double().abs().amax(over, keepdim=True).clamp_min(1e-300)
    return ((actual.double() - expected.double()).abs() / scale).max().item()


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
