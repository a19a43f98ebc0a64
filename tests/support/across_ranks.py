"""Synchronized batch norm as a function of the whole batch, for gradcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mpisyncbn
from support.ranks import WORLD


class Spread(torch.autograd.Function):
    """The identity, for a tensor that is equal on all ranks. Gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Total.apply(grad)


class Total(torch.autograd.Function):
    """The sum of a tensor over ranks. Gradients, equal on all ranks, are passed on unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(WORLD.allreduce(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Spread.apply(grad)


def whole_batch_function(sizes: list[int], activation: str | None = None) -> Callable[..., Tensor]:
    """Return synchronized batch norm as a function of the whole batch, for every rank.

    gradcheck perturbs one value at a time. All ranks perturb the same value, so they stay in step.
    """
    start = sum(sizes[: WORLD.rank])
    mine = slice(start, start + sizes[WORLD.rank])

    def function(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        part = Spread.apply(x)[mine]
        weight, bias = (None if v is None else Spread.apply(v) for v in (weight, bias))
        added = None if residual is None else Spread.apply(residual)[mine]
        y = mpisyncbn.sync_batch_norm(part, None, None, weight, bias, activation=activation, residual=added)
        whole = torch.zeros_like(x)
        whole[mine] = y
        return Total.apply(whole)

    return function


def inputs(sizes: list[int], *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and residual of the whole batch in float64, the same on all ranks."""
    generator = torch.Generator().manual_seed(7)
    whole = (sum(sizes[: WORLD.size]), *shape)
    shapes = (whole, shape[:1], shape[:1], whole)
    x, weight, bias, residual = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    return x, weight, bias, residual


UNEVEN = [2, 3, 1, 2]
ONE_EMPTY = [3, 0, 2, 0]
