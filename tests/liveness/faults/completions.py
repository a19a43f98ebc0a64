"""Ranks end well, though it looks like a failure or others wait for them. The status must be 0."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable

from .case import case
from .job import Job


def _sends_at_the_end(job: Job, register: Callable[[Callable[[], object]], object]) -> None:
    """Let the rank at fault send to rank 0 in a handler, registered before the first step."""
    if job.is_at_fault:
        register(lambda: job.world.send("a last word", 0))
    job.steps()
    if job.is_at_fault:
        job.fault()
    if job.rank == 0:
        print("rank 0 received", job.world.recv(), file=sys.stderr)


_RECEIVED = ["rank 0 received a last word"]


@case(1, says=_RECEIVED, status=0)
def handler_sends(job: Job) -> None:
    """sends in an atexit handler, registered before the first step, what rank 0 waits for"""
    _sends_at_the_end(job, atexit.register)


@case(2, says=_RECEIVED, status=0, under=("-m", "mpi4py"))
def handler_sends_under_mpi4py(job: Job) -> None:
    """sends in such a handler, under -m mpi4py"""
    _sends_at_the_end(job, atexit.register)


class _Last:
    """Calls a function when Python deletes it: for a global, when modules are cleared at exit."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def __del__(self) -> None:
        self.call()


@case(3, says=_RECEIVED, status=0)
def object_sends(job: Job) -> None:
    """sends when Python drops a global object, what rank 0 waits for"""
    _sends_at_the_end(job, lambda call: setattr(sys.modules["__main__"], "last", _Last(call)))


@case(1, says=["rank 1 has taken part in its last step"], status=0)
def handler_steps(job: Job) -> None:
    """runs its last step in an atexit handler, as the others do; it comes there later"""

    def step() -> None:
        job.step()
        print(f"rank {job.rank} has taken part in its last step", file=sys.stderr)

    atexit.register(step)
    job.steps()
    if job.is_at_fault:
        job.fault()


@case(2, says=["rank 2 goes on"], status=0)
def caught_exit(job: Job) -> None:
    """calls sys.exit(5), and catches that"""
    job.steps()
    if job.is_at_fault:
        job.fault()
        try:
            sys.exit(5)
        except SystemExit:
            print("rank 2 goes on", file=sys.stderr)
    job.steps()


@case(0, says=["ZeroDivisionError"], status=0)
def looked_at(job: Job) -> None:
    """prints an exception that it has caught, and leaves it in sys.last_value, as pytest does"""
    job.steps()
    if job.is_at_fault:
        job.fault()
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            kind, sys.last_value, sys.last_traceback = sys.exc_info()
            print(kind, file=sys.stderr)
    job.steps()


@case(0, 1, 2, 3, says=["rank 3 ends with 0"], status=0)
def exit_0(job: Job) -> None:
    """raises SystemExit(0)"""
    job.steps()
    job.fault()
    print(f"rank {job.rank} ends with 0", file=sys.stderr)
    raise SystemExit(0)


@case(1, says=["rank 1 has a child that ended with 7"], status=0)
def child_fails(job: Job) -> None:
    """forks a child that calls os._exit(7)"""
    job.steps()
    if job.is_at_fault:
        child = os.fork()
        if child == 0:
            os._exit(7)
        job.fault()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"rank 1 has a child that ended with {status}", file=sys.stderr)
    job.steps()
