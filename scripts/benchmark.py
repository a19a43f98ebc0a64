"""How long a synchronized layer takes beside torch's local one: ``mpiexec -n 2 python scripts/benchmark.py``.

Forward and backward, one thread a rank, both layers in turn in the same process, so that the
machine's moods hit both alike. Reports the slowest rank: minimum and median, and their ratio.

glibc gives large blocks back to the system when they are freed, and getting them again costs as much
as a kernel, now in one layer and now in the other. So it is told to keep them, for both;
``--default-allocator`` leaves it alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from typing import Any

import torch
from mpi4py import MPI

import mpisyncbn

WORLD = MPI.COMM_WORLD
CASES = [
    # shape per rank, repeats
    ((2, 64, 8, 8), 1000),
    ((8, 64, 56, 56), 100),
    ((8, 512, 28, 28), 60),
    ((8, 64, 112, 112), 40),
]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def step(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> float:
    """Seconds of one forward and backward, all ranks starting together."""
    WORLD.Barrier()
    begin = time.perf_counter()
    layer(x).backward(dy)
    seconds = time.perf_counter() - begin
    x.grad = None
    return seconds


def measure(shape: tuple[int, ...], memory_format: torch.memory_format, repeats: int) -> dict[str, Any]:
    """Collective: every rank must call."""
    generator = torch.Generator().manual_seed(WORLD.rank)
    x, dy = (
        torch.randn(shape, generator=generator).contiguous(memory_format=memory_format) for _ in range(2)
    )
    x.requires_grad_()
    layers = {"local": torch.nn.BatchNorm2d(shape[1]), "sync": mpisyncbn.SyncBatchNorm(shape[1])}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(repeats + 5):
        for name, layer in layers.items():
            taken = step(layer, x, dy)
            if repeat >= 5:  # warm
                seconds[name].append(taken)
    result: dict[str, Any] = {}
    for figure, of in (("minimum", min), ("median", statistics.median)):
        slowest = {name: WORLD.allreduce(of(taken), op=MPI.MAX) for name, taken in seconds.items()}
        result |= {f"{name} {figure}, us": round(value * 1e6, 1) for name, value in slowest.items()}
        result[f"ratio of {figure}s"] = round(slowest["sync"] / slowest["local"], 3)
    return result


def keep_freed_memory() -> None:
    """mallopt of glibc: no block has a mapping of its own, and nothing is given back."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((-3, 1 << 30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(parameter, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="also write the figures and versions there")
    parser.add_argument("--default-allocator", action="store_true", help="let glibc give freed memory back")
    options = parser.parse_args()
    if not options.default_allocator:
        keep_freed_memory()
    torch.set_num_threads(1)
    rows = []
    for shape, repeats in CASES:
        for name, memory_format in FORMATS.items():
            rows.append({"shape": shape, "format": name, **measure(shape, memory_format, repeats)})
            if WORLD.rank == 0:
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json and WORLD.rank == 0:
        versions = {
            "torch": torch.__version__,
            "mpi": MPI.Get_library_version().split(",")[0],
            "ranks": WORLD.size,
        }
        with open(options.json, "w") as file:
            json.dump({**versions, "layers, float32, one thread a rank": rows}, file, indent=1)


if __name__ == "__main__":
    main()
