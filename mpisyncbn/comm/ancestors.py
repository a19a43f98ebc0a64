"""Whether this process is a child of a rank, and no rank itself.

A process that a rank starts (a subprocess, a worker, a program in a shell) inherits the variables
by which the launcher made it a rank. MPI believes them in the child too: it waits for ranks that do
not come, or fails, and may take the rank down with it. So a process looks at its ancestors before
it initializes MPI.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
import warnings

from .. import config

__all__ = ["ancestor_rank_pid", "child_message", "guard"]


def guard() -> None:
    """In a child of a rank, warn before an import of mpi4py.MPI in other code initializes MPI.

    If that has happened, it warns at once. It warns only, because it may go well under Open MPI if
    every rank has started the same child.
    """
    rank_pid = ancestor_rank_pid()
    if rank_pid is not None and "mpi4py.MPI" in sys.modules:
        warnings.warn(child_message(rank_pid), RuntimeWarning, stacklevel=3)  # the import of mpisyncbn
    elif rank_pid is not None:
        sys.meta_path.insert(0, _Finder())


def child_message(rank_pid: int) -> str:
    """The message for a child of the process with this id: what is wrong, and the cure."""
    return (
        f"this process is a child of process {rank_pid}, which is a rank of MPI, and has inherited the "
        "variables that the launcher gave to that rank: MPI would hang here, or fail. Let the rank do what "
        "needs MPI; or start the child with mpiexec, or without variables that begin with PMI, OMPI_ or "
        "SLURM_, as a world of its own"
    )


def ancestor_rank_pid() -> int | None:
    """The id of the nearest ancestor that is a rank, with its variables here, if any."""
    mine = config.rank_identity()
    size, variable = config.mpi_launcher_size()
    if variable and size == 1 and not mine["PMI_FD"]:
        return None  # under PMIx, the children of a single rank may run MPI as worlds of one
    socket, process = _socket(os.getpid(), mine), os.getppid()
    while any((theirs := config.rank_identity(process)).values()):
        # A launcher in between gives its ranks other variables or, if they are the same, another
        # socket.
        if theirs == mine and socket in ("", _socket(process, mine)) and _runs_mpi(process):
            return process
        process = config.parent_of(process)
    return None


def _socket(process: int, identity: dict[str, str]) -> str:
    """The socket by which a process talks to its launcher; empty if it has none of its own."""
    try:
        link = os.readlink(config.PROC / str(process) / "fd" / (identity["PMI_FD"] or "none"))
    except OSError:
        return ""
    return link if link.startswith("socket:") else ""


def _runs_mpi(process: int) -> bool:
    """Whether a process has imported mpi4py.MPI. One that only starts a rank has not."""
    try:
        return b"/mpi4py/MPI." in (config.PROC / str(process) / "maps").read_bytes()
    except OSError:
        return False


class _Finder(importlib.abc.MetaPathFinder):
    """Finds no module, but warns before mpi4py.MPI is imported: Python asks it for every import."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name != "mpi4py.MPI" or not sys.modules["mpi4py"].rc.initialize:
            return
        rank_pid = ancestor_rank_pid()
        if rank_pid is not None:
            warnings.warn(child_message(rank_pid), RuntimeWarning, stacklevel=2)
