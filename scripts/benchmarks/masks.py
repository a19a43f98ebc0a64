"""Time layers with a mask beside the same layers without one: section masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from mpi4py import MPI

import mpisyncbn

from .cases import MASKED, UNMASKED, Case, cases, ratio
from .layers import data
from .timing import interleave

DENSITY = 0.5


def masks(quick: bool) -> Iterator[dict[str, Any]]:
    for case in cases(MASKED, quick):
        figures = interleave(calls(case), seconds=0.4 if quick else 2.5)
        forward = f"forward {UNMASKED}"
        yield {
            **case._asdict(),
            "bytes": case.bytes,
            "us": figures,
            "ours to": {
                UNMASKED: ratio(figures["ours"], figures[UNMASKED]),
                forward: ratio(figures["forward"], figures[forward]),
            },
        }


def calls(case: Case) -> dict[str, Callable[[], object]]:
    """Return functions that run forward and backward, or forward alone.

    There is one of each with a mask of random positions, and one without a mask.
    """
    x, dy = data(case)
    generator = torch.Generator().manual_seed(MPI.COMM_WORLD.rank)
    mask = torch.rand((case.shape[0], 1, *case.shape[2:]), generator=generator) < DENSITY
    layer = mpisyncbn.SyncBatchNorm(case.shape[1])
    return {
        "ours": lambda: torch.autograd.grad(layer(x, mask=mask), x, dy),
        UNMASKED: lambda: torch.autograd.grad(layer(x), x, dy),
        "forward": lambda: layer(x, mask=mask),
        f"forward {UNMASKED}": lambda: layer(x),
    }
