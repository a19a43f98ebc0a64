"""Peers in turn, in the same processes, all ranks starting together; the slowest rank counts."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from itertools import repeat
from time import perf_counter

from mpi4py import MPI

from .cases import STATISTICS, Figures

WORLD = MPI.COMM_WORLD


def interleave(
    peers: dict[str, Callable[[], object]],
    seconds: float,
    *,
    calls: int = 1,
    reset: Callable[[], object] = lambda: None,
    warm: int = 3,
    fewest: int = 5,
    most: int = 1000,
) -> dict[str, Figures]:
    """Microseconds of one call of each peer: over the rounds, then over the ranks the largest.

    Args:
        peers: each makes ``calls`` calls, which are timed as one.
        seconds: how long to go on, within ``fewest`` and ``most`` rounds.
        reset: what to do after each peer, untimed.
        warm: rounds before the first that counts.

    Collective: every rank must call.
    """
    taken: dict[str, list[float]] = {name: [] for name in peers}

    def one_round() -> float:
        start = perf_counter()
        for name, call in peers.items():
            WORLD.Barrier()
            begin = perf_counter()
            call()
            taken[name].append(perf_counter() - begin)
            reset()
        return perf_counter() - start

    for _ in range(warm):
        duration = one_round()
    rounds = min(max(int(seconds / WORLD.allreduce(duration, op=MPI.MAX)), fewest), most)
    for times in taken.values():
        times.clear()
    for _ in range(rounds):
        one_round()
    return {
        name: {
            label: WORLD.allreduce(of(times), op=MPI.MAX) / calls * 1e6
            for label, of in zip(STATISTICS, (statistics.median, min), strict=True)
        }
        for name, times in taken.items()
    }


def often(once: Callable[[], object], calls: int) -> Callable[[], None]:
    """A function that makes so many calls, for ``interleave``."""

    def run() -> None:
        for _ in repeat(None, calls):
            once()

    return run


def copy_fraction(figures: dict[str, Figures], peer: str, tensors: int) -> Figures:
    """The share of the memory's speed that ``peer`` reaches, which moves ``tensors`` tensors.

    The limit is the faster of two ways to copy into existing memory, which moves two tensors.
    """
    return {
        label: tensors / 2 * min(figures["copy_"][label], figures["memmove"][label]) / figures[peer][label]
        for label in STATISTICS
    }


def rounded(value: object) -> object:
    """For the file: four significant digits are more than a measurement has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def keep_freed_memory() -> None:
    """mallopt of glibc: no block has a mapping of its own, and nothing is given back."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((-3, 1 << 30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(parameter, value)
