"""What the tests share: ranks that fail together, uneven shards, and the whole batch in float64."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

# Before MPI starts: tests/test_train.py compares runs to the bit, see scripts/train.py.
os.environ.setdefault("I_MPI_CBWR", "1")
from mpi4py import MPI

WORLD = MPI.COMM_WORLD
HAS_BIAS = "bias" in inspect.signature(torch.nn.BatchNorm1d).parameters  # not in older torch


def once(why: str) -> pytest.MarkDecorator:
    """For what is the same at any number of ranks: it is tried on one."""
    return pytest.mark.skipif(WORLD.size > 1, reason=f"{why}: once is enough")


starts_mpiexec = once("it starts mpiexec itself")
no_exchange = once("no rank meets another in it")


@contextmanager
def together(comm: Any = WORLD) -> Iterator[None]:
    """What fails inside on one rank fails on every rank, so that none is left waiting in a collective.

    Exchanges belong before it, assertions inside: a rank that fails between two exchanges of the
    others would leave them waiting for the time limit.
    """
    problem: BaseException | None = None
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        problem = error
    reports = comm.allgather(problem and "".join(traceback.format_exception(problem)))
    failed = [f"on rank {rank}:\n{report}" for rank, report in enumerate(reports) if report]
    if problem is not None:
        problem.add_note("also " + "\n".join(failed)) if len(failed) > 1 and hasattr(
            problem, "add_note"
        ) else None
        raise problem
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)


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
