"""mpi_loop.c, compiled for this run: rank 0 calls the compiler, every rank loads the library."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from mpi4py import MPI

WORLD = MPI.COMM_WORLD
_SOURCE = Path(__file__).with_name("mpi_loop.c")


@lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none; the same on every rank.

    Collective at the first call.
    """
    code, reason = WORLD.bcast(_compile() if WORLD.rank == 0 else None)
    loaded = None
    if code:
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "mpi_loop.so"
                path.write_bytes(code)
                loaded = ctypes.CDLL(str(path))  # may be deleted then
            reason = _mismatch(loaded)
        except OSError as error:
            reason = f"cannot load it: {error}"
    reasons = [why for why in WORLD.allgather(reason) if why]
    return (None, reasons[0]) if reasons else (loaded, "")


def allreduce_loop(comm: MPI.Intracomm, length: int, calls: int) -> Callable[[], None]:
    """A C loop of ``calls`` in-place MPI_Allreduce of ``length`` float64. Needs ``library()``."""
    loop, message = library()[0].allreduce_loop, np.zeros(length)
    arguments = pointer(comm), buffer(message), length, calls

    def run(_keep: np.ndarray = message) -> None:
        if error := loop(*arguments):
            raise MPI.Exception(error)

    return run


def pointer(comm: MPI.Intracomm) -> ctypes.c_void_p:
    """Where the handle of a communicator is."""
    return ctypes.c_void_p(MPI._addressof(comm))


def buffer(array: np.ndarray) -> ctypes.c_void_p:
    """Where the values of ``array`` are, which must be kept meanwhile."""
    return ctypes.c_void_p(array.ctypes.data)


def sent_counter() -> tuple[Callable[[], int] | None, str]:
    """A function that tells the bytes this rank has sent so far, or None and the reason.

    Collective: every rank must call.
    """
    loaded, reason = library()
    if loaded is None:
        return None, reason
    errors = WORLD.allreduce(abs(loaded.open_counter(b"pml_monitoring_messages_size")), op=MPI.MAX)
    if errors:
        return None, "this MPI has no monitoring component, or it is off (pml_monitoring_enable)"

    def sent() -> int:
        total = ctypes.c_ulonglong()
        if error := loaded.read_counter(ctypes.byref(total)):
            raise MPI.Exception(error)
        return total.value

    return sent, ""


def _compile() -> tuple[bytes, str]:
    """The shared library's bytes and "", or b"" and the reason."""
    wrapper = os.environ.get("MPICC") or shutil.which("mpicc")
    # Without mpicc, CC and CFLAGS have to say where mpi.h is.
    command = shlex.split(wrapper or f"{os.environ.get('CC', '')} {os.environ.get('CFLAGS', '')}")
    if not command:
        return b"", "no mpicc, and no CC in the environment"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mpi_loop.so"
        command += ["-O2", "-fPIC", "-shared", "-o", str(path), str(_SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return b"", f"{command[0]} does not run: {type(error).__name__}"
        if done.returncode:
            return b"", f"{Path(command[0]).name} fails: {(done.stderr.splitlines() or ['no message'])[-1]}"
        return path.read_bytes(), ""


def _mismatch(loaded: ctypes.CDLL) -> str:
    """Why the library cannot be used (mpicc is of another MPI than mpi4py's), or ""."""
    version = ctypes.create_string_buffer(8192)
    loaded.library_version(version)
    ours = MPI.Get_library_version().strip("\0\n ").encode()
    if loaded.handle_size() != MPI._sizeof(MPI.Comm) or version.value.strip() != ours:
        return "mpicc belongs to another MPI library than the one mpi4py loads"
    return ""
