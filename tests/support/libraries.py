"""Find MPI libraries: the environment's, others installed in it, Debian's, or those at a prefix."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from support.jobs import find_mpiexec, unlaunched
from support.ranks import MPI


class _Kind(NamedTuple):
    vendor: str  # as MPI.get_vendor() names it
    file: str
    variables: Mapping[str, str]  # for more ranks than cores
    words: Mapping[str, str]  # patterns: what mpiexec prints if a rank ends without MPI_Finalize


# Open MPI's mpiexec prints the words on stderr, others on stdout. MPICH's names no rank. If a rank
# called exit, MPICH's prints the signal that killed the others, and Intel MPI's names these ranks.
_KINDS = {
    "openmpi": _Kind(
        "Open MPI",
        "libmpi.so.40",
        {},  # jobs.for_jobs sets them
        {
            "signal": r"process rank {rank} with PID \d+ on node \S+ exited on\s+signal {number} ",
            "exit": r"process rank {rank} with PID|@\d+,{rank}\]\s+Exit code: +{number}\b",
            # After MPI_Abort beside MPI_Finalize, mpiexec itself dies of SIGSEGV in
            # PMIx_server_finalize, once in twenty times. This package is not the cause.
            "abort": r"MPI_ABORT was invoked on rank[^-]*Errorcode: {number}\b",
        },
    ),
    "mpich": _Kind(
        "MPICH",
        "libmpi.so.12",
        {},
        {
            "signal": r"EXIT STRING: .* \(signal {number}\)",
            # Once in three times mpiexec prints nothing, and ends with that rank's status, even 0.
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
            # After MPI_Abort, mpiexec itself dies of SIGPIPE, once in a hundred times.
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
_DEBIAN = {"debian-openmpi": "libmpi.so.40", "debian-mpich": "libmpich.so.12"}
_VENDOR = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
name, version = MPI.get_vendor()
print(name, ".".join(map(str, version)), sep="|")
"""


def own() -> str:
    """The name of the environment's MPI library; its vendor's name if it is none of ``NAMES``."""
    vendor = MPI.get_vendor()[0]
    return next((name for name, kind in _KINDS.items() if kind.vendor == vendor), vendor)


@functools.cache
def find(wanted: str) -> Library:
    """Find an MPI library, for example ``mpich``, ``mpich=PREFIX`` or ``debian-mpich``.

    The other names are ``openmpi``, ``impi`` and ``debian-openmpi``. Raises ValueError if there is
    no such library.
    """
    if wanted in _DEBIAN:
        return _of_debian(wanted)
    name, _, prefix = wanted.partition("=")
    if name not in _KINDS:
        raise ValueError(f"expected some of {', '.join([*NAMES, *_DEBIAN])}, got {name!r}")
    kind = _KINDS[name]
    if wanted == own():
        mpiexec, (vendor, version) = find_mpiexec(), MPI.get_vendor()
        if mpiexec is None:
            raise ValueError("no mpiexec on PATH")
        title = f"{vendor} {'.'.join(map(str, version))}"
        return Library(name, title, mpiexec, kind.variables, kind.words)
    at = Path(prefix or f"{sys.prefix}/{name}").resolve()
    return _library(name, f"{at}/bin/mpiexec", {"MPI4PY_LIBMPI": f"{at}/lib/{kind.file}"}, str(at))


def _of_debian(wanted: str) -> Library:
    name, file = wanted.removeprefix("debian-"), _DEBIAN[wanted]
    library = next(Path("/usr/lib").glob(f"*/{file}"), None)
    if library is None:
        raise ValueError(f"no {file} in /usr/lib")
    link = Path(sys.prefix) / "debian" / _KINDS[name].file  # mpi4py wants this name, MPICH has another
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(library)
    variables = {"MPI4PY_LIBMPI": str(link), "LD_LIBRARY_PATH": str(link.parent)}
    found = _library(name, f"/usr/bin/mpiexec.{name}", variables, "/usr")
    return found._replace(title=f"{found.title}, Debian's")


def _library(name: str, mpiexec: str, variables: Mapping[str, str], at: str) -> Library:
    kind = _KINDS[name]
    variables = {**kind.variables, **variables}
    found, version = _vendor(variables) if Path(mpiexec).exists() else ("nothing", "")
    if found != kind.vendor:
        raise ValueError(f"expected {kind.vendor} in {at}, got {found}")
    return Library(name, f"{found} {version}", mpiexec, variables, kind.words)


def _vendor(variables: Mapping[str, str]) -> tuple[str, str]:
    """Name and version of the MPI library that mpi4py loads."""
    command = [sys.executable, "-c", _VENDOR]
    done = subprocess.run(command, env={**unlaunched(), **variables}, capture_output=True, text=True)
    name, _, version = done.stdout.strip().partition("|")
    return name, version
