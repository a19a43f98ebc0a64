"""COMM_WORLD, marks for numbers of ranks, and assertions that fail on all ranks together."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

# Before MPI starts: tests/examples/test_train.py compares runs to the bit, see scripts/train.py.
os.environ.setdefault("I_MPI_CBWR", "1")
from mpi4py import MPI

WORLD = MPI.COMM_WORLD


def ranks(why: str, fewest: int = 1, most: int = sys.maxsize) -> pytest.MarkDecorator:
    """A mark for a test that conftest.py leaves out at other numbers of ranks."""
    return pytest.mark.ranks(fewest, most, why)


def once(why: str) -> pytest.MarkDecorator:
    """A mark for a test that is the same at any number of ranks."""
    return ranks(f"{why}: once is enough", most=1)


several = ranks("it takes two ranks", fewest=2)
# More than two ranks show nothing new, with any library.
up_to_two = ranks("it is the same at any number of ranks above one", most=2)
starts_mpiexec = once("it starts mpiexec itself")
no_exchange = once("no rank meets another in it")


def error_of(call: Callable[[], object], kind: type[Exception]) -> Exception | None:
    """Return the error of type ``kind`` that ``call`` raises on this rank; None without one."""
    try:
        call()
    except kind as error:
        return error
    return None


@contextmanager
def together(comm: MPI.Intracomm = WORLD) -> Iterator[None]:
    """A context for assertions: if one fails on a rank, all ranks fail, and none is left waiting.

    Exchanges belong before it: a rank that fails between two exchanges of the others would leave
    them waiting for the time limit. Collective: every rank of ``comm`` must enter.
    """
    problem: BaseException | None = None
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        problem = error
    reports = comm.allgather(problem and "".join(traceback.format_exception(problem)))
    failed = [f"on rank {rank}:\n{report}" for rank, report in enumerate(reports) if report]
    if problem is not None:
        problem.add_note("also " + "\n".join(failed)) if len(failed) > 1 and hasattr(
            problem, "add_note"
        ) else None
        raise problem
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
