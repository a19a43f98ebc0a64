"""One rank ends in an orderly way, the others wait for it."""

from __future__ import annotations

import os
import sys

from .case import NOT_ZERO, case, ends_job, has_left, waits
from .job import Job


def _after_steps(job: Job) -> bool:
    """Whether this rank is the one to end."""
    job.steps()
    if job.is_at_fault:
        job.fault()
    return job.is_at_fault


@case(1, says=[ends_job(1, 5)], status=5)
def exit_5(job: Job) -> None:
    """calls sys.exit(5)"""
    if _after_steps(job):
        sys.exit(5)
    job.train()


@case(3, says=[ends_job(3, 5)], status=5)
def exit_5_first(job: Job) -> None:
    """calls sys.exit(5) before its first exchange"""
    if job.is_at_fault:
        job.fault()
        sys.exit(5)
    job.train()


@case(0, says=["no such data", ends_job(0)], status=1)
def exit_text(job: Job) -> None:
    """calls sys.exit("no such data")"""
    if _after_steps(job):
        sys.exit("no such data")
    job.train()


@case(2, says=[has_left(2)], status=1)
def raise_exit_3(job: Job) -> None:
    """raises SystemExit(3)"""
    if _after_steps(job):
        raise SystemExit(3)
    job.train()


@case(1, says=[has_left(1)], status=1)
def exit_0(job: Job) -> None:
    """calls sys.exit(0), early"""
    if _after_steps(job):
        sys.exit(0)
    job.train()


@case(
    0,
    # nobody can be told, or asked, before the group has met
    says=[
        *waits(1, 2, 3),
        "mpisyncbn: the other ranks could not be asked before the first exchange\n"
        r"  rank 0 (has not come: its process \d+ is|may have come, on another host: no process of it) ",
    ],
    status=124,
    variables={"MPISYNCBN_TIMEOUT": "3"},
)
def exit_0_first(job: Job) -> None:
    """calls sys.exit(0) before its first exchange"""
    if job.is_at_fault:
        job.fault()
        sys.exit(0)
    job.train()


@case(2, says=[has_left(2)], status=1)
def fewer_batches(job: Job) -> None:
    """comes to its end with fewer batches"""
    for _ in range(3 if job.is_at_fault else 1000):
        job.step()
    job.fault()


@case(0, says=[has_left(0)], status=1)
def finalizes(job: Job) -> None:
    """calls MPI.Finalize() early, and ends"""
    if _after_steps(job):
        from mpi4py import MPI

        MPI.Finalize()
        return
    job.train()


@case(1, says=[r"(?i:abort).*rank 1\b"], status=9)
def aborts(job: Job) -> None:
    """calls COMM_WORLD.Abort(9) itself"""
    if _after_steps(job):
        job.world.Abort(9)
    job.train()


@case(2, silent=("exit", 0), status=NOT_ZERO)
def os_exit_0(job: Job) -> None:
    """calls os._exit(0), which runs nothing"""
    if _after_steps(job):
        os._exit(0)
    job.train()


@case(1, silent=("exit", 3), status=NOT_ZERO)
def os_exit_3(job: Job) -> None:
    """calls os._exit(3), which runs nothing"""
    if _after_steps(job):
        os._exit(3)
    job.train()
