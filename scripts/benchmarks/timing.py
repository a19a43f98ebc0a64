"""Time peers in turn in the same processes. Ranks start together; the slowest counts."""

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
    """Time one call of each peer in microseconds.

    The figures are the median and the minimum over the rounds; of each, the largest over the ranks.

    Args:
        peers: functions that make ``calls`` calls each, which are timed together.
        seconds: the time for all rounds, of which there are from ``fewest`` to ``most``.
        reset: a function to call after each peer, untimed.
        warm: the number of rounds that come first and do not count.

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
    """Return a function that calls ``once`` ``calls`` times, for ``interleave``."""

    def run() -> None:
        for _ in repeat(None, calls):
            once()

    return run


def copy_fraction(figures: dict[str, Figures], peer: str, tensors: int) -> Figures:
    """The fraction of the speed of copying that ``peer`` reaches, if it moves ``tensors`` tensors.

    A copy reads one tensor and writes another: it moves two. The faster of two ways counts.
    """
    return {
        label: tensors / 2 * min(figures["copy_"][label], figures["memmove"][label]) / figures[peer][label]
        for label in STATISTICS
    }


def rounded(value: object) -> object:
    """Round all floats to four significant digits, more than a measurement has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later use.

    Blocks below 1 GiB get no mapping of their own, and nothing is returned to the system.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((-3, 1 << 30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(parameter, value)
