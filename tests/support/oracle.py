"""Uneven shards, and the float64 batch norm of the whole batch to compare results with."""

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
    """The number of samples of this rank, ``base + rank``: an uneven split."""
    return base + comm.rank


def shard(
    shape: tuple[int, ...], seed: int = 0, mean: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Random data of this rank, different on every rank."""
    generator = torch.Generator().manual_seed(1000 * seed + WORLD.rank)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """``x`` in every memory layout, by name."""
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
    """Batch norm of the whole batch in float64, and its gradients: ``whole_batch`` with defaults.

    Collective: every rank of ``comm`` must call.
    """
    return whole_batch(comm, x, dy, weight, bias, eps)


def bits_equal_on_all_ranks(tensor: Tensor, comm: MPI.Intracomm = WORLD) -> bool:
    """Whether the bits are equal on all ranks. Collective: every rank of ``comm`` must call."""
    return len(set(comm.allgather(tensor.detach().numpy().tobytes()))) == 1
