"""Time the host's work for a small layer on a GPU: ours, and torch.nn.SyncBatchNorm.

    PYTHON=python3 scripts/standin calls python3 scripts/host_time.py

With scripts/standin there is no GPU: kernels and communication return at once for both layers, and
only the time of the host remains. ``torch.nn.SyncBatchNorm`` is in a group of two ranks of torch's
"fake" backend. With the stand-in, it does not look for empty batches, for which it would wait for
the device. On a GPU, ``PYTHONPATH=. python3 scripts/host_time.py`` times the host while the device
works. Each layer is called ten times in a row, as layers of a model follow each other.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from mpi4py import MPI

import mpisyncbn
from benchmarks.timing import interleave, often
from outputs import output

SHAPE, CALLS = (2, 64, 8, 8), 10


def group(transport: str) -> mpisyncbn.Communicator:
    """A group of this rank alone that uses ``transport``."""
    with mock.patch.dict(os.environ, {"MPISYNCBN_TRANSPORT": transport}):
        found = mpisyncbn.Communicator(MPI.COMM_SELF).ready()
    if found.transport != transport:
        raise SystemExit(f"host_time: expected the {transport} transport, got {found.transport}")
    return found


def without_mask(layer: Any) -> Any:
    """With the stand-in, let a torch.nn.SyncBatchNorm skip its mask of empty batches.

    torch skips it while a CUDA graph is captured. The stand-in has no values from which to make it.
    """
    capturing = torch.cuda.is_current_stream_capturing

    def forward(x: torch.Tensor) -> torch.Tensor:
        torch.cuda.is_current_stream_capturing = lambda: True
        try:
            return type(layer).forward(layer, x)
        finally:
            torch.cuda.is_current_stream_capturing = capturing

    if os.environ.get("MPISYNCBN_STANDIN"):
        layer.forward = forward
    return layer


def calls(layer: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x = torch.randn(SHAPE, device="cuda", dtype=dtype)
    leaf, dy = x.clone().requires_grad_(), torch.randn(SHAPE, device="cuda", dtype=dtype)

    def forward() -> None:
        layer(leaf)

    def step() -> None:
        leaf.grad = layer.weight.grad = layer.bias.grad = None
        layer(leaf).backward(dy)

    return {"forward": forward, "forward and backward": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transports", default="stream,host", help="those of ours to time (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds for each table")
    parser.add_argument("--output", type=output, metavar="PATH", help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.enabled = not os.environ.get("MPISYNCBN_STANDIN")  # the stand-in has none
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    # The backend copies its input to each row of the output. The layer's is a single row.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(dist, name)
    setattr(dist, name, lambda out, mine, *more, **kwargs: gather(out.view(2, -1), mine, *more, **kwargs))
    names = options.transports.split(",")
    layers: dict[str, Any] = {
        f"ours, {name}": mpisyncbn.SyncBatchNorm(SHAPE[1], process_group=group(name), device="cuda")
        for name in names
    }
    layers["torch.nn.SyncBatchNorm"] = without_mask(torch.nn.SyncBatchNorm(SHAPE[1], device="cuda"))
    layers["torch.nn.BatchNorm2d"] = torch.nn.BatchNorm2d(SHAPE[1], device="cuda")
    written: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        tables = {name: calls(layer, dtype) for name, layer in layers.items()}
        for what in ("forward", "forward and backward"):
            peers = {name: often(table[what], CALLS) for name, table in tables.items()}
            times = interleave(
                peers,
                options.seconds,
                calls=CALLS,
                reset=torch.cuda.synchronize,
                warm=5,
                fewest=50,
                most=5000,
            )
            theirs = times["torch.nn.SyncBatchNorm"]
            title = f"{what}, {str(dtype).removeprefix('torch.')}"
            print(f"{SHAPE} {title}: us, median (minimum), over torch.nn.SyncBatchNorm's")
            written[title] = {
                name: {key: times[name][key] for key in ("median", "minimum")} for name in peers
            }
            for name, found in times.items():
                over = " ".join(f"{found[key] / theirs[key]:.2f}" for key in ("median", "minimum"))
                print(f"  {name:24s} {found['median']:7.1f} ({found['minimum']:.1f})  {over}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(written, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
