"""Data with masks, uneven over ranks, and the values that masks select, for the tests of masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support.oracle import local_batch, shard
from support.ranks import WORLD

RANK, SIZE = WORLD.rank, WORLD.size
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ACTIVATIONS = [None, "relu", "leaky_relu(0.1)", "silu"]


def random_mask(batch: int, *shape: int) -> Tensor:
    return shard((batch, 1, *shape), 50) < 0


def nothing(batch: int, *shape: int) -> Tensor:
    return torch.zeros((batch, 1, *shape), dtype=torch.bool)


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual and dy of this rank, with NaN or infinity where the mask is False, and the mask.

    Rank 2 has no samples. The mask of the last rank is False everywhere if there are several ranks.
    """
    batch = 0 if RANK == 2 else local_batch(4)
    mask = nothing(batch, *shape[1:]) if SIZE > 1 and RANK == SIZE - 1 else random_mask(batch, *shape[1:])
    bad = (math.nan, math.inf, -math.inf)
    found = [shard((batch, *shape), seed, mean) for seed, mean in ((1, 2.0), (2, 0.0), (3, 0.0))]
    x, residual, dy = (v.masked_fill(~mask, b).to(dtype) for v, b in zip(found, bad, strict=True))
    return x, residual, dy, mask


def rows(x: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is True, in a tensor of shape (n, C)."""
    return x.movedim(1, -1)[mask.movedim(1, -1)[..., 0]]


def is_0_elsewhere(x: Tensor, mask: Tensor) -> bool:
    return bool((x.detach()[~mask.expand(x.shape)] == 0).all())


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.linspace(0.5, 1.5, channels).to(dtype).requires_grad_()
    return weight, torch.linspace(-1, 1, channels).to(dtype).requires_grad_()
