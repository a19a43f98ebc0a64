"""Uneven shards, and the batch norm of the whole batch in float64 that results are compared with."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.ranks import WORLD

HAS_BIAS = "bias" in inspect.signature(torch.nn.BatchNorm1d).parameters  # not in older torch


def local_batch(base: int = 2, comm: Any = WORLD) -> int:
    """An uneven split: rank r has ``base + r`` samples."""
    return base + comm.rank


def shard(
    shape: tuple[int, ...], seed: int = 0, mean: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """This rank's random data; different on every rank."""
    generator = torch.Generator().manual_seed(1000 * seed + WORLD.rank)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


class Oracle(NamedTuple):
    """Batch norm of the gathered whole batch in float64, and this rank's part of it."""

    y: Tensor
    dx: Tensor
    dweight: Tensor  # of the whole batch: the sum over ranks
    dbias: Tensor
    mean: Tensor
    var: Tensor  # biased
    count: int


def oracle(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    comm: Any = WORLD,
) -> Oracle:
    """Collective: every rank of ``comm`` must call."""
    shards, gradients = comm.allgather(x.detach().double()), comm.allgather(dy.detach().double())
    whole, dwhole = torch.cat(shards), torch.cat(gradients)
    dims = (0, *range(2, whole.ndim))
    view = (1, -1) + (1,) * (whole.ndim - 2)
    count = whole.numel() // whole.shape[1]
    w = torch.ones(whole.shape[1], dtype=torch.float64) if weight is None else weight.detach().double()
    b = torch.zeros_like(w) if bias is None else bias.detach().double()
    mean = whole.mean(dims)
    xmu = whole - mean.view(view)
    var = xmu.square().mean(dims)
    invstd = (var + eps).rsqrt()
    xhat = xmu * invstd.view(view)
    y = xhat * w.view(view) + b.view(view)
    dweight, dbias = (dwhole * xhat).sum(dims), dwhole.sum(dims)
    dx = (dwhole - (dbias / count).view(view) - xhat * (dweight / count).view(view)) * (invstd * w).view(view)
    start = sum(len(s) for s in shards[: comm.rank])
    mine = slice(start, start + len(x))
    return Oracle(y[mine], dx[mine], dweight, dbias, mean, var, count)


def distance(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference, in units of the largest expected value; 0 for empty tensors."""
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return 0.0
    assert actual.shape == expected.shape
    scale = expected if scale is None else scale
    largest = scale.double().abs().max().clamp_min(1e-300)
    return ((actual.double() - expected.double()).abs().max() / largest).item()


def bits_equal_on_all_ranks(tensor: Tensor, comm: Any = WORLD) -> bool:
    """Collective."""
    return len(set(comm.allgather(tensor.detach().numpy().tobytes()))) == 1
