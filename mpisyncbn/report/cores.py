"""The cores that this process may use, and whether its MPI library yields them while it waits."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from .. import config

__all__ = ["SYSTEM", "cores", "quota", "yields"]

SYSTEM = Path("/sys/fs/cgroup")
# The control variables by which Open MPI and Intel MPI give way to other processes while they wait.
# MPICH says nothing of it: 5.0 from PyPI yields, 4.0 of Debian does not.
_YIELDING = "mpi_yield_when_idle", "MPIR_CVAR_IMPI_WAIT_MODE"


def cores() -> frozenset[int]:
    """The numbers of the cores that this process is bound to, or of all cores."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def quota() -> tuple[str, float] | None:
    """The control group that limits this process's processor time, and its number of cores.

    The group's name is the same in all its processes, in containers too. None without a limit.
    """
    limits = []
    for folder in _control_groups():
        limit = _limit(folder)
        if limit is not None:
            found = folder.stat()
            limits.append((limit, f"{found.st_dev}:{found.st_ino}"))
    if not limits:
        return None
    limit, group = min(limits)
    return group, limit


def _control_groups() -> Iterator[Path]:
    """The folders of this process's control groups for processor time, and of those around them."""
    try:
        lines = (config.PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (SYSTEM / controllers, SYSTEM / "cpu") if controllers else (SYSTEM,):
            folder = root / path.lstrip("/")
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(root))


def _limit(folder: Path) -> float | None:
    """The limit of a control group in cores, of version 2 or 1; None without one."""
    with suppress(OSError, ValueError):
        time, period = (folder / "cpu.max").read_text().split()
        return int(time) / int(period)  # int() raises for "max"
    with suppress(OSError, ValueError):
        time, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(time) / int(period) if int(time) > 0 else None
    return None


def yields(MPI: ModuleType) -> bool:
    """Whether MPI says, by its tool interface, that a waiting rank yields its core."""
    try:
        library = ctypes.CDLL(MPI.__file__)  # its symbols are also those of the MPI library
        level = MPI.Query_thread()  # Open MPI takes on the level that is asked for here
        if library.MPI_T_init_thread(level, ctypes.byref(ctypes.c_int())) != MPI.SUCCESS:
            return False
        try:
            return any(_control_variable(MPI, library, name) == 1 for name in _YIELDING)
        finally:
            library.MPI_T_finalize()
    except (AttributeError, OSError):
        return False


def _control_variable(MPI: ModuleType, library: ctypes.CDLL, name: str) -> int | None:
    """The value of a control variable that is one number; None if MPI has no such variable."""
    index, count, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if library.MPI_T_cvar_get_index(name.encode(), ctypes.byref(index)) != MPI.SUCCESS:
        return None
    if library.MPI_T_cvar_handle_alloc(index, None, ctypes.byref(handle), ctypes.byref(count)) != MPI.SUCCESS:
        return None
    value = (ctypes.c_int * 64)()  # room for more than it should be
    read = count.value == 1 and library.MPI_T_cvar_read(handle, value) == MPI.SUCCESS
    library.MPI_T_cvar_handle_free(ctypes.byref(handle))
    return value[0] if read else None
