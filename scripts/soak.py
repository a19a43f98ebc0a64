"""Check that exchanges leak no memory: make many, of all kinds, and see whether memory has grown.

    scripts/soak                        100,000 exchanges on 4 ranks
    scripts/soak --exchanges 1000000    more of them
    RANKS=2 scripts/soak                on 2 ranks

It calls layers, ``sync_batch_norm`` and the NumPy functions, forward, backward and twice backward,
in several sizes and dtypes, in groups of all ranks, of half of them and of one. It prints for each
rank how much its resident memory and the number of its Python objects have grown since the warm-up.
Exit status: 0, or 1 if memory grew by more than 1 MiB on some rank.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI

import mpisyncbn
from mpisyncbn import functional

WORLD = MPI.COMM_WORLD
LIMIT = 1024  # KiB
WARM_UP = 5000  # exchanges; by then torch, MPI and the allocator have all the memory that they use
_SAMPLES = 25  # counts; the least is taken, so that memory in use for a short time does not matter


class Growth(NamedTuple):
    """The growth of one rank."""

    kib: int
    objects: int
    exchanges: int  # after the warm-up
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    everyone = WORLD.allgather(soak(options.exchanges))
    if WORLD.rank == 0:
        print("rank  exchanges  exchanges/s  memory, KiB  objects")
        for rank, grown in enumerate(everyone):
            rate = grown.exchanges / grown.seconds
            print(f"{rank:4d}  {grown.exchanges:9d}  {rate:11.0f}  {grown.kib:+11d}  {grown.objects:+7d}")
    return int(any(grown.kib > LIMIT for grown in everyone))


def soak(exchanges: int, warm_up: int = WARM_UP) -> Growth:
    """Make at least ``exchanges`` exchanges after a warm-up, and return this rank's growth.

    Collective: every rank must call.
    """
    cycles = Cycles()
    cycles.run(warm_up)
    kib, objects = least(cycles)
    start = time.perf_counter()
    done = cycles.run(exchanges)
    seconds = time.perf_counter() - start
    kib_after, objects_after = least(cycles)
    cycles.free()
    return Growth(kib_after - kib, objects_after - objects, done, seconds)


class Cycles:
    """Cycles of exchanges: each makes every kind once, in the same order on all ranks."""

    def __init__(self) -> None:
        half = mpisyncbn.Communicator(WORLD.Split(WORLD.rank % 2))
        self.groups = [mpisyncbn.Communicator(), half, mpisyncbn.Communicator(MPI.COMM_SELF)]
        self.cases = list(self._cases())
        self.number = 0

    def _cases(self) -> Iterator[tuple[mpisyncbn.SyncBatchNorm, torch.Tensor]]:
        generator = torch.Generator().manual_seed(WORLD.rank)
        world, half, alone = self.groups
        for group, shape, dtype, options in (
            (world, (4, 8), torch.float32, {}),
            (world, (2, 64, 28, 28), torch.float32, {"activation": "relu"}),
            (world, (3, 16, 5, 5), torch.float64, {"momentum": None}),
            (half, (3, 32, 7), torch.bfloat16, {"affine": False}),
            (half, (2, 512, 2, 2), torch.float32, {"track_running_stats": False}),
            (alone, (2, 4, 3, 3), torch.float64, {"bias": False}),
        ):
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            layer = mpisyncbn.SyncBatchNorm(shape[1], process_group=group, dtype=wide, **options)
            batch = (shape[0] + WORLD.rank, *shape[1:])
            yield layer, torch.randn(batch, generator=generator).to(dtype)

    def run(self, exchanges: int) -> int:
        """Make at least ``exchanges`` exchanges. Return how many were made."""
        before = self.exchanges()
        while self.exchanges() - before < exchanges:
            self.once()
        return self.exchanges() - before

    def exchanges(self) -> int:
        return sum(group.exchanges for group in self.groups)

    def once(self) -> None:
        self.number += 1
        for layer, values in self.cases:
            # on ranks 0 to 6, the batch is empty in one cycle of 7
            x = values[: 0 if self.number % 7 == WORLD.rank else None].requires_grad_()
            residual = (torch.ones_like(x),) if layer.activation else ()
            layer(x, *residual).sum().backward()
        layer, values = self.cases[0]
        x = values.clone().requires_grad_()
        y = mpisyncbn.sync_batch_norm(x, None, None, layer.weight, process_group=layer.process_group)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        self._arrays(values.numpy())

    def _arrays(self, x: np.ndarray) -> None:
        for group, values in zip(self.groups, (x, x.astype(np.float64), x[:, ::2]), strict=True):
            _, stats = functional.batch_norm_forward(values, process_group=group)
            functional.batch_norm_backward(values, values, stats, process_group=group)
            mean, var = np.zeros((2, values.shape[1]), values.dtype)
            functional.update_running_stats(mean, var, stats, 0.1)

    def free(self) -> None:
        for group in self.groups:
            group.free()


def least(cycles: Any) -> tuple[int, int]:
    """The resident memory in KiB and the number of objects, each the least of several counts.

    One cycle runs before each count.
    """
    seen = []
    for _ in range(_SAMPLES):
        cycles.once()
        gc.collect()
        _trim()
        seen.append((_resident(), len(gc.get_objects())))
    kib, objects = (min(counts) for counts in zip(*seen, strict=True))
    return kib, objects


def _trim() -> None:
    """Make the allocator return the freed memory that it keeps: the amount varies."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--exchanges", type=int, default=100_000, metavar="N", help="exchanges after the warm-up"
    )
    options = parser.parse_args(arguments)
    if options.exchanges < 1:
        parser.error(f"--exchanges takes at least 1, got {options.exchanges}")
    return options


if __name__ == "__main__":
    sys.exit(main())
