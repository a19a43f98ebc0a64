"""A rank is alive, but does not come to an exchange. MPISYNCBN_TIMEOUT ends the job."""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import Any

from .case import case, missing, traceback, waits
from .job import SIZE, Job, sleep

SECONDS = 3


def _deadline(**variables: str) -> dict[str, Any]:
    variables = {"MPISYNCBN_TIMEOUT": str(SECONDS), **variables}
    return {"status": 124, "limit": SECONDS + 5, "variables": variables}


def absent(rank: int, *says: str, **variables: str) -> Any:
    """A decorator for a case in which all other ranks wait for ``rank``."""
    others = (each for each in range(SIZE) if each != rank)
    return case(rank, says=[*waits(*others), *says], **_deadline(**variables))


@absent(2, *missing(2, "sleep"))
def skips_a_layer(job: Job) -> None:
    """skips a layer and sleeps"""
    job.steps()
    if job.is_at_fault:
        job.fault()
    else:
        job.step()
    sleep() if job.is_at_fault else job.train()


@absent(0, *missing(0, "sleep"))
def sleeps(job: Job) -> None:
    """sleeps between two steps"""
    job.after_steps(sleep)


@absent(1, *missing(1, "endless_loop"))
def endless_loop(job: Job) -> None:
    """runs an endless loop in Python"""
    job.steps()
    if job.is_at_fault:
        job.fault()
        number = 0
        while True:
            number += 1
    job.train()


@absent(3, *missing(3, "locked_twice"))
def locked_twice(job: Job) -> None:
    """waits for a threading.Lock that it holds"""
    job.steps()
    if job.is_at_fault:
        lock = threading.Lock()
        with lock:
            job.fault()
            lock.acquire()
    job.train()


@absent(2, r"^  rank 2 on \S+ is missing: no answer, its process \d+ is stopped")
def stopped(job: Job) -> None:
    """is stopped by SIGSTOP"""
    job.after_steps(lambda: os.kill(os.getpid(), signal.SIGSTOP))


@case(
    1,
    says=[
        *waits(0, 1, 2, 3),
        r"^  rank \d on \S+ is missing: .* waits in exchange number \d+ of another one, ",
    ],
    **_deadline(),
)
def groups_crossed(job: Job) -> None:
    """uses two groups in another order than the others"""
    one, other = job.world.Dup(), job.world.Dup()
    for group in (one, other):
        job.step(group)
    job.fault()
    for group in (other, one) if job.is_at_fault else (one, other):
        job.step(group)
    job.train()


@absent(0, *missing(0, "receives"))
def receives(job: Job) -> None:
    """waits in its own COMM_WORLD.recv"""
    job.steps()
    if job.is_at_fault:
        job.fault()
        job.world.recv(source=3)
    job.train()


@absent(
    1,
    "mpisyncbn: the other ranks could not be asked before the first exchange\n"
    r"  rank 1 has not come: its process \d+ is alive$",
)
def never_begins(job: Job) -> None:
    """sleeps before its first exchange"""
    if job.is_at_fault:
        job.fault()
        sleep()
    job.train()


@absent(3, *missing(3, "in_a_barrier"))
def in_a_barrier(job: Job) -> None:
    """goes on to its own COMM_WORLD.barrier"""
    job.steps()
    if job.is_at_fault:
        job.fault()
        job.world.barrier()
    job.train()


@absent(2, *missing(2, "sleep"))
def in_threads(job: Job) -> None:
    """sleeps in a thread; all ranks run their steps in one"""
    job.steps()

    def run() -> None:
        if job.is_at_fault:
            job.fault()
            sleep()
        job.train()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@case(
    3,
    says=[
        r"^mpisyncbn: rank 0 of 2 on \S+ has waited .* exchange number \d+, forward of",
        r"^  rank 1 on \S+ is missing: .* in sleep$",
    ],
    **_deadline(),
)
def one_group_of_two(job: Job) -> None:
    """sleeps in one of two groups; the other one goes on"""
    group = job.world.Split(job.rank // 2)
    job.step(group)
    if job.is_at_fault:
        job.fault()
        sleep()
    job.train(lambda: job.step(group))


@absent(1, *missing(1, "sleep"))
def gathers(job: Job) -> None:
    """sleeps while layers in float64 gather"""
    job.step(dtype="float64")
    if job.is_at_fault:
        job.fault()
        sleep()
    job.train(lambda: job.step(dtype="float64"))


@absent(0, *missing(0, "sleep"), MPISYNCBN_DEBUG="1")
def in_debug_mode(job: Job) -> None:
    """sleeps, with MPISYNCBN_DEBUG=1"""
    job.after_steps(sleep)


@absent(2, r"^  rank 2 on \S+ is missing: no answer, its process")
def holds_python(job: Job) -> None:
    """is in C code that keeps Python to itself"""
    job.after_steps(lambda: re.match(r"(a+)+$", "a" * 64 + "b"))


@absent(3, "RuntimeError: no more of it", *missing(3, "goes_on"))
def thread_goes_on(job: Job) -> None:
    """raises, and a thread of it keeps Python from its end"""

    def goes_on() -> None:
        sleep()

    job.steps()
    if job.is_at_fault:
        threading.Thread(target=goes_on).start()
        job.fault()
        raise RuntimeError("no more of it")
    job.train()


@absent(1, "mpisyncbn: the other ranks could not be asked", MPI4PY_RC_THREAD_LEVEL="serialized")
def serialized(job: Job) -> None:
    """sleeps, where MPI is for one thread at a time, so that no other rank can be asked"""
    job.after_steps(sleep)


@absent(
    1,
    *missing(1, "sleep"),
    r"number \d+, backward of ModuleDict: first \(3 channels",
    traceback("hook"),
)
def in_backward(job: Job) -> None:
    """sleeps in a hook of backward, ahead of a named layer"""
    import torch

    import mpisyncbn

    layers = {"first": torch.nn.BatchNorm1d(3), "second": torch.nn.BatchNorm1d(3)}
    net = torch.nn.ModuleDict(layers)
    mpisyncbn.convert_sync_batchnorm(net)
    x = torch.randn(2 + job.rank, 3, requires_grad=True)

    def hook(_: torch.Tensor) -> None:
        if job.is_at_fault:
            job.fault()
            sleep()

    y = net["first"](x)
    y.register_hook(hook)
    net["second"](y).pow(2).sum().backward()
    job.train()
