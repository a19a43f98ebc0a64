"""One rank ends in an orderly way, and the others wait for it."""

from __future__ import annotations

import builtins
import os
import sys
import threading
from typing import NoReturn

from .case import NOT_ZERO, case, ends_job, has_left, missing, waits
from .job import Job, sleep


def _raise(code: object) -> NoReturn:
    raise SystemExit(code)


def _not_there(rank: int) -> list[str]:
    return [
        "mpisyncbn: the other ranks could not be asked before the first exchange\n"
        rf"  rank {rank} (has not come: its process \d+ is|may have come, on another host: no process of it) "
    ]


@case(1, says=[ends_job(1, 5)], status=5)
def exit_5(job: Job) -> None:
    """calls sys.exit(5)"""
    job.after_steps(lambda: sys.exit(5))


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
    job.after_steps(lambda: sys.exit("no such data"))


@case(2, says=[ends_job(2, 3)], status=3)
def raise_exit_3(job: Job) -> None:
    """raises SystemExit(3)"""
    job.after_steps(lambda: _raise(3))


@case(1, says=[ends_job(1, 7)], status=7)
def raise_exit_7(job: Job) -> None:
    """raises SystemExit(7); the others wait in their own COMM_WORLD.barrier"""
    job.after_steps(lambda: _raise(7), job.world.barrier)


@case(1, says=[ends_job(1, 7)], status=7, under=("-m", "mpi4py"))
def raise_exit_7_under_mpi4py(job: Job) -> None:
    """raises SystemExit(7), under -m mpi4py; the others wait in their own COMM_WORLD.barrier"""
    job.after_steps(lambda: _raise(7), job.world.barrier)


@case(3, says=["no such data", ends_job(3)], status=1)
def raise_exit_text(job: Job) -> None:
    """raises SystemExit("no such data"); the others wait in their own COMM_WORLD.barrier"""
    job.after_steps(lambda: _raise("no such data"), job.world.barrier)


@case(0, says=[ends_job(0, 7)], status=7)
def raise_exit_7_first(job: Job) -> None:
    """raises SystemExit(7) before its first exchange"""
    if job.is_at_fault:
        job.fault()
        raise SystemExit(7)
    job.train()


@case(2, says=[ends_job(2, 7)], status=7)
def builtin_exit(job: Job) -> None:
    """calls the builtin exit(7); the others wait in their own COMM_WORLD.barrier"""
    job.after_steps(lambda: builtins.exit(7), job.world.barrier)


@case(0, says=["ZeroDivisionError", ends_job(0, 3)], status=3)
def hook_exits(job: Job) -> None:
    """raises, with a sys.excepthook that calls sys.exit(3); the others wait in their own barrier"""

    def hook(kind: type[BaseException], *_: object) -> NoReturn:
        print(kind.__name__, file=sys.stderr, flush=True)
        sys.exit(3)

    sys.excepthook = hook
    job.after_steps(lambda: 1 / 0, job.world.barrier)


@case(1, says=[r"(?i:abort).*rank 1\b|MPI_Abort\(MPI_COMM_WORLD, 7\) - process 1"], status=7)
def abort_status(job: Job) -> None:
    """calls set_abort_status(7) and ends; the others wait in their own COMM_WORLD.barrier"""
    from mpi4py.run import set_abort_status

    job.after_steps(lambda: set_abort_status(7), job.world.barrier)


@case(
    3,
    says=[
        r"^mpisyncbn: rank [012] of 4 on \S+ has waited [\d.]+ s \(the limit is 3 s, MPISYNCBN_TIMEOUT\) "
        "at the end of its program for other ranks of its group$",
        *missing(3, "sleep"),
    ],
    status=124,
    variables={"MPISYNCBN_TIMEOUT": "3"},
)
def never_ends(job: Job) -> None:
    """sleeps where the others have come to their end"""
    job.after_steps(sleep, lambda: None)


@case(1, says=[has_left(1)], status=1)
def exit_0(job: Job) -> None:
    """calls sys.exit(0), early"""
    job.after_steps(lambda: sys.exit(0))


@case(
    0,
    # before the first exchange of a group, a rank cannot tell or ask the others anything
    says=[*waits(1, 2, 3), *_not_there(0)],
    status=124,
    variables={"MPISYNCBN_TIMEOUT": "3"},
)
def exit_0_first(job: Job) -> None:
    """calls sys.exit(0) before its first exchange"""
    if job.is_at_fault:
        job.fault()
        sys.exit(0)
    job.train()


@case(
    2,
    # an exception in a thread leaves Python's exit status at 0
    says=[*waits(0, 1, 3), "RuntimeError: no more of it", *_not_there(2)],
    status=124,
    variables={"MPISYNCBN_TIMEOUT": "3"},
)
def thread_first(job: Job) -> None:
    """raises in a thread before its first exchange, and comes to its end"""

    def fail() -> NoReturn:
        raise RuntimeError("no more of it")

    if job.is_at_fault:
        job.fault()
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    else:
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
    from mpi4py import MPI

    job.after_steps(MPI.Finalize)


@case(1, says=[r"(?i:abort).*rank 1\b"], status=9)
def aborts(job: Job) -> None:
    """calls COMM_WORLD.Abort(9) itself"""
    job.after_steps(lambda: job.world.Abort(9))


@case(2, silent=("exit", 0), status=NOT_ZERO)
def os_exit_0(job: Job) -> None:
    """calls os._exit(0), which runs nothing"""
    job.after_steps(lambda: os._exit(0))


@case(1, silent=("exit", 3), status=NOT_ZERO)
def os_exit_3(job: Job) -> None:
    """calls os._exit(3), which runs nothing"""
    job.after_steps(lambda: os._exit(3))
