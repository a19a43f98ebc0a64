"""Whether this process is a child of a rank, and no rank itself.

What a rank starts (a subprocess, a worker, a program in a shell) inherits the variables by which the
launcher made it a rank. MPI believes them in the child too: it waits for ranks that do not come, or fails,
and may take the rank down with it. So a process looks above itself before it initializes MPI.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
import warnings
from typing import Any

from .. import config

__all__ = ["guard", "of_child", "rank_above"]


def guard() -> None:
    """Where this is the child of a rank, warn before somebody else's import of mpi4py.MPI initializes MPI.

    No error: under Open MPI it may go well, if every rank has started the same child.
    """
    if rank_above() is not None:
        sys.meta_path.insert(0, _Finder())


def of_child(rank: int) -> str:
    """What is wrong in a child of this process, and the cure."""
    return (
        f"this process is a child of process {rank}, which is a rank of MPI, and has inherited the variables "
        "that the launcher gave to that rank: MPI would hang here, or fail. Let the rank do what needs MPI; "
        "or start the child with mpiexec, or without variables that begin with PMI, OMPI_ or SLURM_, as a "
        "world of its own"
    )


def rank_above() -> int | None:
    """The process of which this one is a child, if it is a rank of MPI and handed its variables down."""
    mine = config.identity()
    size, variable = config.tasks()
    if variable and size == 1 and not mine["PMI_FD"]:
        return None  # PMIx lets children of a rank that has no others be worlds of one
    socket, process = _socket(os.getpid(), mine), os.getppid()
    while any((theirs := config.identity(process)).values()):
        # A launcher in between gives variables of its own or, if they say the same, a socket of its own.
        if theirs == mine and socket in ("", _socket(process, mine)) and _runs_mpi(process):
            return process
        process = config.parent_of(process)
    return None


def _socket(process: int, identity: dict[str, str]) -> str:
    """By which a process talks to its launcher; nothing if it has none, or did not inherit it."""
    try:
        link = os.readlink(config.PROC / str(process) / "fd" / (identity["PMI_FD"] or "none"))
    except OSError:
        return ""
    return link if link.startswith("socket:") else ""


def _runs_mpi(process: int) -> bool:
    """Whether it has imported mpi4py.MPI; what only starts a rank, such as a shell or torchrun, has not."""
    try:
        return b"/mpi4py/MPI." in (config.PROC / str(process) / "maps").read_bytes()
    except OSError:
        return False


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing, and is asked before every import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        rank = rank_above() if name == "mpi4py.MPI" and sys.modules["mpi4py"].rc.initialize else None
        if rank is not None:
            warnings.warn(of_child(rank), RuntimeWarning, stacklevel=2)
