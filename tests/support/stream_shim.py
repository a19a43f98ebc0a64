"""A driver between the stream transport's worker and the stand-in, and an MPI for one rank."""

from __future__ import annotations

import ctypes
import subprocess
import time
from pathlib import Path
from typing import Any

from support.standin_driver import CXX, headers, library

_BEGINNING = """
#include <cuda.h>
#include <dlfcn.h>
#define ENTRY extern "C" CUresult
#define REAL(name) ((decltype(&name))dlsym(dlopen(STANDIN, RTLD_NOW), #name))
"""


def built(source: str, folder: Path) -> Path:
    """Compile C++ that defines some functions of the driver. REAL(name) is the stand-in's."""
    path, real = folder / "libshim.so", library()
    (folder / "shim.cpp").write_text(_BEGINNING + source)
    options = ["-std=c++17", "-shared", "-fPIC", f"-I{headers()}", f'-DSTANDIN="{real}"']
    linked = ["-Wl,--no-as-needed", f"-Wl,-rpath,{real.parent}", real, "-ldl"]
    command = [*CXX, *options, folder / "shim.cpp", *linked, "-o", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


class Sent:
    """An MPI_Allreduce for one rank. It records fingerprints and first values of messages."""

    def __init__(self) -> None:
        kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 6)
        self.messages: list[tuple[float, float]] = []
        self.function = kind(self.reduce)
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value

    def reduce(self, _: int, message: int, *more: int) -> int:
        words = (ctypes.c_double * 4).from_address(message)
        self.messages.append((words[0], words[3]))
        return 0


def drain(worker: Any) -> None:
    """Wait until a worker has performed all that is enqueued. Fails after a minute."""
    limit = time.monotonic() + 60
    while worker.pending and time.monotonic() < limit:
        time.sleep(0.001)
    assert worker.pending == 0
