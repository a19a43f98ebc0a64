"""The activations of layers, and the torch modules that compute the same functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The keys are texts that the argument ``activation`` takes.
TORCHS: dict[str | None, nn.Module] = {
    None: nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "leaky_relu(0.1)": nn.LeakyReLU(0.1),
    "leaky_relu(-0.2)": nn.LeakyReLU(-0.2),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "elu": nn.ELU(),
    "elu(0.5)": nn.ELU(0.5),
    "gelu": nn.GELU(),
    "gelu(tanh)": nn.GELU("tanh"),
}
ACTIVATIONS = [text for text in TORCHS if text]
# More parameters, for tests of the kernels alone.
MORE = {
    "leaky_relu(0)": nn.LeakyReLU(0.0),
    "leaky_relu(0.3)": nn.LeakyReLU(0.3),
    "leaky_relu(1)": nn.LeakyReLU(1.0),
    "elu(-0.7)": nn.ELU(-0.7),
}
# One activation for each way to find the gradient: from the sign of the output, or from the input.
TWO = ["leaky_relu(0.1)", "silu"]


def far_from_kinks(z: Tensor, activation: str | None, margin: float) -> Tensor:
    """A mask: if ``z`` is farther than ``margin`` from jumps of the activation's derivatives."""
    kinks = () if activation is None or "gelu" in activation or activation == "silu" else (0.0,)
    if activation == "hardswish":
        kinks = (-3.0, 3.0)
    distances = [(z.detach() - kink).abs() for kink in kinks]
    return torch.stack([torch.full_like(z, torch.inf, requires_grad=False), *distances]).amin(0) > margin
