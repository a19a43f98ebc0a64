"""A signal ends one rank; the others wait for it."""

from __future__ import annotations

import ctypes
import os
import signal

from .case import NOT_ZERO, case, ends_job
from .job import Job


def _get(job: Job, number: signal.Signals) -> None:
    job.after_steps(lambda: os.kill(os.getpid(), number))


@case(2, silent=("signal", 9), status=NOT_ZERO)
def sigkill(job: Job) -> None:
    """gets SIGKILL, as for want of memory"""
    _get(job, signal.SIGKILL)


@case(1, silent=("signal", 15), status=NOT_ZERO)
def sigterm(job: Job) -> None:
    """gets SIGTERM"""
    _get(job, signal.SIGTERM)


@case(3, says=["KeyboardInterrupt", ends_job(3, 130)], status=130)
def sigint(job: Job) -> None:
    """gets SIGINT: KeyboardInterrupt"""
    _get(job, signal.SIGINT)


@case(0, silent=("signal", 11), status=NOT_ZERO)
def sigsegv(job: Job) -> None:
    """reads at address 0: SIGSEGV"""
    job.after_steps(lambda: ctypes.string_at(0))
