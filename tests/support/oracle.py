"""Uneven shards, and the batch norm of the whole batch in float64 that results are compared with."""

from __future__ import annotations

import inspect

import torch
from mpi4py import MPI
from torch import Tensor

from support.ranks import WORLD
from support.whole_batch import WholeBatch, whole_batch
from support.whole_batch import distance as distance

HAS_BIAS = "bias" in inspect.signature(torch.nn.BatchNorm1d).parameters  # not in older torch


def local_batch(base: int = 2, comm: MPI.Intracomm = WORLD) -> int:
    """An uneven split: rank r has ``base + r`` samples."""
    return base + comm.rank


def shard(
    shape: tuple[int, ...], seed: int = 0, mean: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """This rank's random data; different on every rank."""
    generator = torch.Generator().manual_seed(1000 * seed + WORLD.rank)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in every way that they may lie in memory."""
    found = {"contiguous": x.contiguous()}
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    found["channels last"] = last
    padded = x.new_zeros(*x.shape[:-1], x.shape[-1] * 2)
    padded[..., ::2] = x
    found["strided"] = padded[..., ::2]
    if x.ndim >= 4:
        found["permuted"] = x.transpose(2, 3).contiguous().transpose(2, 3)
        sliced = torch.cat([last, last], 1).movedim(1, -1).contiguous().movedim(-1, 1)
        found["sliced channels last"] = sliced[:, : x.shape[1]]
        found["sliced"] = torch.cat([x, x], 1)[:, : x.shape[1]]
        found["offset"] = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)  # not at a cache line
    return found


def oracle(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    comm: MPI.Intracomm = WORLD,
) -> WholeBatch:
    """Collective: every rank of ``comm`` must call."""
    return whole_batch(comm, x, dy, weight, bias, eps)


def bits_equal_on_all_ranks(tensor: Tensor, comm: MPI.Intracomm = WORLD) -> bool:
    """Collective."""
    return len(set(comm.allgather(tensor.detach().numpy().tobytes()))) == 1
