"""Points 7 and 9 of scripts/gpu_check: forward and backward on different streams."""

from __future__ import annotations

import torch

import mpisyncbn
from support.whole_batch import distance, whole_batch

from .context import Context
from .reference import random

_CYCLES = 40_000_000


def streams(context: Context) -> None:
    """Check a layer with forward and backward on different streams. Collective."""
    first, second = torch.cuda.Stream(context.device), torch.cuda.Stream(context.device)
    default = torch.cuda.default_stream(context.device)
    for name, forward, backward in (
        ("backward on a side stream", default, first),
        ("forward on a side stream", first, default),
        ("on two side streams", first, second),
    ):
        with context.records.trying(name):
            for step in range(3 if context.quick else 10):
                _step(context, name, step, forward, backward)


def _step(
    context: Context, name: str, step: int, forward: torch.cuda.Stream, backward: torch.cuda.Stream
) -> None:
    layer = mpisyncbn.SyncBatchNorm(32, device=context.device)
    x = (random((4 + context.rank, 32, 16, 16), 20 * step + context.rank) * (step + 1)).float()
    dy = random(tuple(x.shape), 20 * step + context.rank + 10, mean=step).float()
    fresh, late_dy = context.there(x), context.there(dy)
    leaf, dy_there = torch.zeros_like(fresh), torch.zeros_like(late_dy)
    context.synchronize()
    with torch.cuda.stream(forward):
        torch.cuda._sleep(_CYCLES)
        leaf.copy_(fresh)
        leaf.requires_grad_()
        y = layer(leaf)
    backward.wait_stream(forward)
    with torch.cuda.stream(backward):
        torch.cuda._sleep(_CYCLES)
        dy_there.copy_(late_dy)
        y.backward(dy_there)
    context.synchronize()
    weight, bias = layer.weight.detach().cpu(), layer.bias.detach().cpu()
    expected = whole_batch(context.world, x, dy, weight, bias, layer.eps)
    context.records.at_most(f"{name}, step {step}: y", distance(y, expected.y), 1e-5)
    error = distance(leaf.grad, expected.dx, expected.dx_scale)
    context.records.at_most(f"{name}, step {step}: dx", error, 1e-5)
