"""Compile mpi_loop.c for this run on rank 0, and load the library on every rank."""

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
    """Return the library and "", or None and the reason why there is none, alike on every rank.

    The first call is collective: every rank must make it.
    """
    code, reason = WORLD.bcast(_compile() if WORLD.rank == 0 else None)
    loaded = None
    if code:
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "mpi_loop.so"
                path.write_bytes(code)
                loaded = ctypes.CDLL(str(path))  # the file may be deleted after this
            reason = _mismatch(loaded)
        except OSError as error:
            reason = f"cannot load it: {error}"
    reasons = [why for why in WORLD.allgather(reason) if why]
    return (None, reasons[0]) if reasons else (loaded, "")


def allreduce_loop(comm: MPI.Intracomm, length: int, calls: int) -> Callable[[], None]:
    """Return a function that makes ``calls`` in-place MPI_Allreduce of ``length`` float64, in C.

    ``library()`` must have returned a library.
    """
    loop, message = library()[0].allreduce_loop, np.zeros(length)
    arguments = pointer(comm), buffer(message), length, calls

    def run(_keep: np.ndarray = message) -> None:
        if error := loop(*arguments):
            raise MPI.Exception(error)

    return run


def pointer(comm: MPI.Intracomm) -> ctypes.c_void_p:
    """The address of a communicator's handle."""
    return ctypes.c_void_p(MPI._addressof(comm))


def buffer(array: np.ndarray) -> ctypes.c_void_p:
    """The address of the values of ``array``. The caller must keep the array alive."""
    return ctypes.c_void_p(array.ctypes.data)


def sent_counter() -> tuple[Callable[[], int] | None, str]:
    """Return a function for the bytes that this rank has sent, and ""; or None and the reason.

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
    """Compile mpi_loop.c. Return the bytes of the shared library and "", or b"" and the reason."""
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
    """Return the reason if mpicc belongs to another MPI library than mpi4py's, or ""."""
    version = ctypes.create_string_buffer(8192)
    loaded.library_version(version)
    ours = MPI.Get_library_version().strip("\0\n ").encode()
    if loaded.handle_size() != MPI._sizeof(MPI.Comm) or version.value.strip() != ours:
        return "mpicc belongs to another MPI library than the one mpi4py loads"
    return ""
