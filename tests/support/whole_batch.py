"""Batch norm of the batch of all ranks, in float64 on the host. Importing this starts no MPI."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mpi4py import MPI


class WholeBatch(NamedTuple):
    y: Tensor  # this rank's part
    dx: Tensor
    dweight: Tensor  # of the whole batch: the sum over ranks
    dbias: Tensor
    mean: Tensor
    var: Tensor  # biased
    count: int
    dx_scale: float  # the largest term of dx; terms may cancel to nothing
    sum_scale: float  # the largest sum of absolute terms of dweight and dbias


def whole_batch(
    comm: MPI.Intracomm, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> WholeBatch:
    """Batch norm of all ranks' shards, and its gradients. Tensors are on the host, of any dtype.

    Collective: every rank of ``comm`` must call.
    """
    shards, gradients = (comm.allgather(each.detach().double().contiguous()) for each in (x, dy))
    whole, dwhole = torch.cat(shards), torch.cat(gradients)
    dims, view = (0, *range(2, whole.ndim)), (1, -1) + (1,) * (whole.ndim - 2)
    count = whole.numel() // whole.shape[1]
    w = torch.ones(whole.shape[1], dtype=torch.float64) if weight is None else weight.detach().double()
    b = torch.zeros_like(w) if bias is None else bias.detach().double()
    mean = whole.mean(dims)
    mean = mean + (whole - mean.view(view)).mean(dims)  # adds what rounding lost if the mean is large
    xmu = whole - mean.view(view)
    var = xmu.square().mean(dims)
    invstd = torch.where((var == 0) & (eps == 0), 0.0, (var + eps).rsqrt())
    xhat, scale = xmu * invstd.view(view), (invstd * w).view(view)
    dweight, dbias = (dwhole * xhat).sum(dims), dwhole.sum(dims)
    dx = (dwhole - (dbias / count).view(view) - xhat * (dweight / count).view(view)) * scale
    start = sum(len(s) for s in shards[: comm.rank])
    mine = slice(start, start + len(x))
    y = xhat[mine] * w.view(view) + b.view(view)
    dx_scale = (dwhole * scale).abs().max().item() if count else 0.0
    sum_scale = max((dwhole * xhat).abs().sum(dims).max().item(), dwhole.abs().sum(dims).max().item())
    return WholeBatch(y, dx[mine], dweight, dbias, mean, var, count, dx_scale, sum_scale)


def distance(actual: Tensor, expected: Tensor, scale: Tensor | float | None = None) -> float:
    """The largest difference, relative to the largest expected value or ``scale``; 0 if empty.

    It is infinite if any value is NaN, since ``max`` of several distances may leave out a NaN.
    """
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    expected = expected.detach().double().cpu()
    scale = expected if scale is None else scale
    largest = scale.double().abs().max().item() if isinstance(scale, Tensor) else scale
    difference = (actual.detach().double().cpu() - expected).abs().max().item()
    relative = difference / max(largest, 1e-300)
    return math.inf if math.isnan(relative) else relative
