"""Uneven shards, and the batch norm of the whole batch in float64 that results are compared with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from support.ranks import WORLD
from support.whole_batch import WholeBatch, whole_batch
from support.whole_batch import distance as distance

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


def oracle(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    comm: Any = WORLD,
) -> WholeBatch:
    """Collective: every rank of ``comm`` must call."""
    return whole_batch(comm, x, dy, weight, bias, eps)


def bits_equal_on_all_ranks(tensor: Tensor, comm: Any = WORLD) -> bool:
    """Collective."""
    return len(set(comm.allgather(tensor.detach().numpy().tobytes()))) == 1
