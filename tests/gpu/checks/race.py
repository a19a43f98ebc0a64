"""Point 2 of scripts/gpu_check: nothing is read before it is written, unless waits are left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch

import mpisyncbn
from mpisyncbn.comm import groups, transport
from mpisyncbn.errors import TransportError
from support.whole_batch import distance, whole_batch

from .context import Context
from .records import summary
from .reference import random

_TIMES = 20
_COPIES = 64  # several times the number of pinned buffers
_CYCLES = 60_000_000  # of a device's clock, about 30 ms: the host could do its part a hundred times
_WRONG = 1e-3  # larger errors are not due to rounding


def race(context: Context) -> None:
    """Check a layer whose input and gradient are written late on a side stream. Collective."""
    records = context.records
    layer = mpisyncbn.SyncBatchNorm(64, device=context.device)
    try:
        _steps(context, layer, 1)  # compiles the kernels: later that would take longer than the delay
    except TransportError as error:
        records.skip("layer", summary(error))
        return
    records.figure("transport", groups.resolve(None).transport)
    good = _steps(context, layer, 5 if context.quick else _TIMES)
    records.at_most("worst error, waits in place", max(good), 1e-5)
    with _no_waits():
        bad = _steps(context, layer, 5 if context.quick else _TIMES, may_raise=True)
    wrong = sum(not error <= _WRONG for error in bad)
    records.figure("wrong without the waits", f"{wrong} of {len(bad)}")
    records.holds("wrong at least once without the waits", wrong > 0, "this test would not see a race")
    records.at_most("worst error, afterwards", max(_steps(context, layer, 2)), 1e-5)


def _steps(context: Context, layer: Any, times: int, may_raise: bool = False) -> list[float]:
    """Return the error of ``y`` and ``dx`` in each step, the largest of all ranks. Collective.

    An error is infinite if it would be NaN, or if the step raises and ``may_raise`` is true.
    """
    side = torch.cuda.Stream(context.device)
    weight, bias = layer.weight.detach().cpu(), layer.bias.detach().cpu()
    errors = []
    for step in range(times):
        # Each step has other moments, so values that an earlier step left in a buffer are wrong.
        x = (random((4 + context.rank, 64, 16, 16), 100 * step + context.rank) * (step + 1) + step).float()
        dy = random(tuple(x.shape), 100 * step + 50 + context.rank, mean=step).float()
        fresh, late_dy = context.there(x), context.there(dy)
        there, dy_there = torch.zeros_like(fresh), torch.zeros_like(late_dy)
        context.synchronize()
        problem: Exception | None = None
        try:
            with torch.cuda.stream(side):
                torch.cuda._sleep(_CYCLES)
                there.copy_(fresh)
                leaf = there.requires_grad_()
                y = layer(leaf)
                torch.cuda._sleep(_CYCLES)
                dy_there.copy_(late_dy)
                y.backward(dy_there)
        except Exception as error:
            problem = error
        context.synchronize()
        if problem is not None and not may_raise:
            raise problem
        expected = whole_batch(context.world, x, dy, weight, bias, layer.eps)
        error = float("inf")
        if problem is None:
            error = distance(y, expected.y) + distance(leaf.grad, expected.dx, expected.dx_scale)
        errors.append(max(context.world.allgather(error)))
    return errors


def buffers(context: Context) -> None:
    """Check more copies to a busy device than there are pinned buffers. It uses no MPI."""
    records = context.records
    for waits, name in ((True, "waits in place"), (False, "without the waits")):
        with nullcontext() if waits else _no_waits():
            wrong = _uploads(context.device)
        records.figure(f"wrong copies, {name}", wrong)
        records.holds(f"copies {name}", (wrong == 0) == waits, f"{wrong} are wrong")


def _uploads(device: torch.device) -> int:
    like, side = torch.zeros(1, device=device), torch.cuda.Stream(device)
    # Long vectors: a driver may read a short one at once, and send it with the command.
    sent = [np.full(16384, float(number + 1)) for number in range(_COPIES)]
    with torch.cuda.stream(side):
        for vector in sent:  # makes the buffers
            transport.to_device_of(like, vector)
        torch.cuda.synchronize(device)
        torch.cuda._sleep(_CYCLES)
        got = [transport.to_device_of(like, vector)[0] for vector in sent]
    torch.cuda.synchronize(device)
    return sum(
        not np.array_equal(found.cpu().numpy(), vector) for found, vector in zip(got, sent, strict=True)
    )


@contextmanager
def _no_waits() -> Iterator[None]:
    """A context in which waits for events return at once. torch.cuda.synchronize still waits."""
    with mock.patch.object(torch.cuda.Event, "synchronize", return_value=None):
        yield
