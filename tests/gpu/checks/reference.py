"""Batch norm of the batch of all ranks in float64, on the host; and data to try it with."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Largest error of y and dx, in units of their scale: for half precision, one rounding of the result.
BARS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class Whole(NamedTuple):
    y: Tensor  # this rank's part
    dx: Tensor
    dweight: Tensor  # of the whole batch
    dbias: Tensor
    mean: Tensor
    var: Tensor  # biased
    count: int
    dx_scale: float
    sum_scale: float


def whole_batch(world: Any, x: Tensor, dz: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Whole:
    """For ``x`` and the gradient of the normalized, both on the host, of any dtype. Collective."""
    shards = world.allgather((x.double().contiguous(), dz.double().contiguous()))
    everything, gradient = (torch.cat(parts) for parts in zip(*shards, strict=True))
    dims, view = per_channel(x)
    weight, bias = weight.double(), bias.double()
    count = everything.numel() // x.shape[1]
    mean = everything.mean(dims)
    xmu = everything - mean.view(view)
    mean = mean + xmu.mean(dims)  # what the first sum lost where the mean is large
    xmu = everything - mean.view(view)
    var = xmu.square().mean(dims)
    invstd = torch.where((var == 0) & (eps == 0), 0.0, (var + eps).rsqrt())
    xhat = xmu * invstd.view(view)
    y = xhat * weight.view(view) + bias.view(view)
    dweight, dbias = (gradient * xhat).sum(dims), gradient.sum(dims)
    dx = gradient - (dbias / count).view(view) - xhat * (dweight / count).view(view)
    dx = dx * (invstd * weight).view(view)
    begin = sum(len(shard) for shard, _ in shards[: world.rank])
    mine = slice(begin, begin + len(x))
    dx_scale = (gradient * (invstd * weight).view(view)).abs().max().item()
    sum_scale = max((gradient * xhat).abs().sum(dims).max().item(), gradient.abs().sum(dims).max().item())
    return Whole(y[mine], dx[mine], dweight, dbias, mean, var, count, dx_scale, sum_scale)


def per_channel(x: Tensor) -> tuple[list[int], tuple[int, ...]]:
    return [dim for dim in range(x.ndim) if dim != 1], (1, -1) + (1,) * (x.ndim - 2)


def distance(found: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest difference, in units of ``scale``, which is the largest expected value unless it is given."""
    if found.shape != expected.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, got {tuple(found.shape)}")
    if expected.numel() == 0:
        return 0.0
    expected = expected.double().cpu()
    scale = expected.abs().max().item() if scale is None else scale
    difference = (found.detach().double().cpu() - expected).abs()
    return (difference.max() / max(scale, 1e-300)).item()  # NaN where there is one


def random(shape: tuple[int, ...], seed: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Float64, on the host."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channels side by side, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def digest(*tensors: Tensor) -> str:
    """Of all their bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
