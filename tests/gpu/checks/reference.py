"""Random data for layers, and the largest errors that results may have."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# The largest error of y and dx, relative to their scale. In half precision it is one rounding.
BARS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def random(shape: tuple[int, ...], seed: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return normal values in float64, on the host."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channels side by side, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def digest(*tensors: Tensor) -> str:
    """Return a hash of all bits of the tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
