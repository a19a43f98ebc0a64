"""Time all-reduces and a step of DistributedDataParallel, beside gloo: section reductions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpisyncbn
from mpisyncbn.distributed import BACKEND

from .cases import ratio
from .timing import interleave, often

KILOBYTES = (1, 10, 100, 1_000, 25_000)
QUICK_KILOBYTES = (1, 100)


def reductions(quick: bool) -> Iterator[dict[str, Any]]:
    mpisyncbn.init_process_group(timeout=timedelta(seconds=60))
    try:
        groups = {BACKEND: None, "gloo": dist.new_group(backend="gloo")}
        for kilobytes in QUICK_KILOBYTES if quick else KILOBYTES:
            x = torch.ones(kilobytes * 250)
            calls = 20 if kilobytes <= 100 else 1
            once = {name: partial(dist.all_reduce, x, group=group) for name, group in groups.items()}
            peers = {name: often(reduce, calls) for name, reduce in once.items()}
            yield _row("all_reduce", x.nbytes, interleave(peers, 1.0 if quick else 4.0, calls=calls))
        net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4 if quick else 25)])
        size = sum(parameter.nbytes for parameter in net.parameters())
        peers = {
            name: _step(DistributedDataParallel(net, process_group=group)) for name, group in groups.items()
        }
        figures = interleave({**peers, "no reduction": _step(net)}, 2.0 if quick else 10.0)
        yield _row("DistributedDataParallel step", size, figures)
    finally:
        dist.destroy_process_group()


def _row(what: str, size: int, figures: dict[str, Any]) -> dict[str, Any]:
    row = {
        "family": what,
        "shape": (size,),
        "dtype": "uint8",
        "format": "bytes",
        "bytes": size,
        "us": figures,
    }
    return row | {"ours to": {"gloo": ratio(figures[BACKEND], figures["gloo"])}}


def _step(net: nn.Module) -> Callable[[], None]:
    x = torch.randn(32, 1024)

    def step() -> None:
        net(x).sum().backward()

    return step
