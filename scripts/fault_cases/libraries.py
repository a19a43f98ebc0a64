"""MPI libraries: that of the environment, others installed beside it, or anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class _Kind(NamedTuple):
    vendor: str  # as mpi4py has it
    file: str
    variables: Mapping[str, str]  # for more ranks than cores
    words: Mapping[str, str]  # of mpiexec, as patterns, for a rank that ended without MPI_Finalize


# Open MPI's mpiexec says it on stderr, the others on stdout. MPICH's names no rank. Where a rank called exit,
# it gives the signal by which it killed the others, and Intel MPI's names the ranks that it killed.
_KINDS = {
    "openmpi": _Kind(
        "Open MPI",
        "libmpi.so.40",
        {},  # as benchmarks.scaling sets them
        {
            "signal": r"process rank {rank} with PID \d+ on node \S+ exited on\s+signal {number} ",
            "exit": r"process rank {rank} with PID|@\d+,{rank}\]\s+Exit code: +{number}\b",
        },
    ),
    "mpich": _Kind(
        "MPICH",
        "libmpi.so.12",
        {},
        {
            "signal": r"EXIT STRING: .* \(signal {number}\)",
            # Once in three times it says nothing, and ends with the status of that rank, be it 0.
            "exit": r"EXIT STRING: Killed \(signal 9\)|\A\s*\Z",
        },
    ),
    "impi": _Kind(
        "Intel MPI",
        "libmpi.so.12",
        {"I_MPI_FABRICS": "shm", "I_MPI_PIN": "0", "I_MPI_WAIT_MODE": "1"},
        {
            "signal": r"RANK {rank} PID \d+ RUNNING AT \S+\n=   KILLED BY SIGNAL: {number} ",
            "exit": r"RANK (?!{rank})\d PID \d+ RUNNING AT \S+\n=   KILLED BY SIGNAL: 9 ",
            # Once in a hundred times it ends of SIGPIPE itself, when a rank has called MPI_Abort.
            "abort": r"application called MPI_Abort\(MPI_COMM_WORLD, {number}\)",
        },
    ),
}


class Library(NamedTuple):
    name: str
    title: str  # name and version
    mpiexec: str
    variables: Mapping[str, str]
    words: Mapping[str, str]


NAMES = tuple(_KINDS)
_VENDOR = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
name, version = MPI.get_vendor()
print(name, ".".join(map(str, version)), sep="|")
"""


def find(name: str) -> Library:
    """``openmpi``, ``mpich`` or ``impi``, or ``mpich=PREFIX``; the environment's own for an empty name.

    Raises ValueError where it is not there.
    """
    name, _, prefix = name.partition("=")
    own, version = vendor({})
    mine = next((key for key, kind in _KINDS.items() if kind.vendor == own), "")
    name = name or mine
    if name not in _KINDS:
        raise ValueError(f"expected some of {', '.join(NAMES)}, got {name or own!r}")
    kind = _KINDS[name]
    if name == mine and not prefix:
        mpiexec = shutil.which("mpiexec")
        if mpiexec is None:
            raise ValueError("no mpiexec on PATH")
        return Library(name, f"{own} {version}", mpiexec, kind.variables, kind.words)
    at = Path(prefix or f"{sys.prefix}/{name}").resolve()
    variables = {**kind.variables, "MPI4PY_LIBMPI": f"{at}/lib/{kind.file}"}
    there, version = vendor(variables) if (at / "bin" / "mpiexec").exists() else ("nothing", "")
    if there != kind.vendor:
        raise ValueError(f"expected {kind.vendor} in {at}, got {there}")
    return Library(name, f"{there} {version}", f"{at}/bin/mpiexec", variables, kind.words)


def debian() -> Iterator[Library]:
    """Those of Debian's packages that are installed; no other name than these tells them from the rest."""
    for name, file in (("openmpi", "libmpi.so.40"), ("mpich", "libmpich.so.12")):
        mpiexec = Path(f"/usr/bin/mpiexec.{name}")
        for library in Path("/usr/lib").glob(f"*/{file}") if mpiexec.exists() else ():
            kind = _KINDS[name]
            link = Path(sys.prefix) / "debian" / kind.file  # the name that mpi4py wants, which MPICH lacks
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            variables = {**kind.variables, "MPI4PY_LIBMPI": str(link), "LD_LIBRARY_PATH": str(link.parent)}
            title, version = vendor(variables)
            yield Library(name, f"{title} {version}, Debian's", str(mpiexec), variables, kind.words)


def vendor(variables: Mapping[str, str]) -> tuple[str, str]:
    """Name and version of what mpi4py loads."""
    command = [sys.executable, "-c", _VENDOR]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    name, _, version = done.stdout.strip().partition("|")
    return name, version
