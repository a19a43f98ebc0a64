"""A rank raises, and the others wait. ``python`` runs without ``-m mpi4py`` unless stated."""

from __future__ import annotations

import atexit
import resource
import sys
import threading
from typing import Any, NoReturn

import numpy as np

from .case import case, ends_job, has_left, traceback
from .job import Job

_RAISED = r"RuntimeError: no more of it"


def _raise(job: Job) -> NoReturn:
    job.fault()
    raise RuntimeError("no more of it")


def _raise_after_steps(job: Job) -> NoReturn:
    job.steps()
    if job.is_at_fault:
        _raise(job)
    job.train()


@case(2, says=[_RAISED, ends_job(2), traceback("before_the_first_exchange")], status=1)
def before_the_first_exchange(job: Job) -> None:
    """raises before its first exchange"""
    if job.is_at_fault:
        _raise(job)
    job.train()


@case(0, says=[_RAISED, ends_job(0), traceback("between_layers")], status=1)
def between_layers(job: Job) -> None:
    """raises in its forward, between two layers"""

    def forward() -> None:
        job.step()
        if job.is_at_fault:
            _raise(job)
        job.step()

    job.steps()
    job.train(forward)


@case(3, says=[_RAISED, ends_job(3), r"the hook of rank 3 saw RuntimeError"], status=1)
def with_excepthook(job: Job) -> None:
    """raises, with a sys.excepthook of its own"""
    usual = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: Any) -> None:
        print(f"the hook of rank {job.rank} saw {kind.__name__}", file=sys.stderr, flush=True)
        usual(kind, value, trace)

    sys.excepthook = hook
    _raise_after_steps(job)


@case(1, says=[_RAISED, ends_job(1), r"the handler of rank 1 has run"], status=1)
def with_atexit(job: Job) -> None:
    """raises, with an atexit handler"""
    atexit.register(lambda: print(f"the handler of rank {job.rank} has run", file=sys.stderr, flush=True))
    _raise_after_steps(job)


@case(0, says=[_RAISED, ends_job(0), traceback("_raise_after_steps")], status=1, under=("-m", "mpi4py"))
def under_mpi4py(job: Job) -> None:
    """raises, under -m mpi4py"""
    _raise_after_steps(job)


@case(2, says=[_RAISED, ends_job(2), traceback("others_in_a_barrier")], status=1)
def others_in_a_barrier(job: Job) -> None:
    """raises; the others wait in their own COMM_WORLD.barrier"""
    job.steps()
    if job.is_at_fault:
        _raise(job)
    job.world.barrier()


@case(0, 3, says=[_RAISED, rf"{ends_job(0)}|{ends_job(3)}"], status=1)
def two_ranks(job: Job) -> None:
    """raise at the same time"""
    _raise_after_steps(job)


@case(1, says=[has_left(1), _RAISED, "Exception in thread in_thread"], status=1)
def in_thread(job: Job) -> None:
    """raises in a thread, and comes to its end"""
    thread = threading.Thread(target=_raise_after_steps, args=(job,), name="in_thread")
    thread.start()
    thread.join()


@case(1, says=[r"MemoryError", ends_job(1), traceback("out_of_memory")], status=1)
def out_of_memory(job: Job) -> None:
    """runs out of memory (RLIMIT_AS)"""
    job.steps()
    if job.is_at_fault:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, resource.RLIM_INFINITY))
        job.fault()
        np.ones(2**28)
    job.train()
