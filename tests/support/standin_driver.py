"""The stand-in for CUDA as one library, for a process whose torch is built without CUDA.

    path = library()                  # compiled once: StreamWorker(driver=path) opens it
    driver = Driver(path)             # by ctypes: the same streams, memory and graphs
    stream, flags = driver.stream(), driver.flags()
    driver.cuStreamWaitValue32_v2(stream, flags, 1, EQ)
    driver.cuStreamSynchronize(stream)

Each path is a separate device: library(another) is a copy, which may have another order of work and
other settings. It reads them from environment variables, which device.h lists.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "standin"
CXX = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")
GEQ, EQ = 0, 1
GLOBAL, THREAD, RELAXED = 0, 1, 2
MOVE = 1  # a flag of cuGraphRetainUserObject
BELL, DONE, MESSAGE, RESULT = 0, 4, 8, 12  # offsets in a Worker's mailbox: two uint32, two floats
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def headers() -> Path | None:
    """The folder of the CUDA headers that Triton contains; None without them."""
    found = find_spec("triton")
    folder = Path(found.origin).parent / "backends" / "nvidia" / "include" if found and found.origin else None
    return folder if folder and (folder / "cuda_runtime_api.h").is_file() else None


def missing() -> str | None:
    """Why the library cannot be compiled here; None if it can."""
    if not headers():
        return "no Triton that brings CUDA's headers"
    return None if shutil.which(CXX[0]) else "no C++ compiler"


needs_library = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@functools.cache
def library(copy: Path | None = None) -> Path:
    """The path of the compiled library, or of its copy at ``copy``, which is a separate device."""
    if copy:
        return Path(shutil.copy(library(), copy))
    folder = Path(tempfile.mkdtemp(prefix="standin"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = ["-fPIC", "-fvisibility=hidden", f"-I{headers()}"]  # hidden: a copy has its own state
    object, path = folder / "driver.o", folder / "libstandin.so"
    _run(*CXX, *options, "-c", "-xc", FOLDER / "driver.c", "-o", object)
    sources = (FOLDER / f"{name}.cpp" for name in ("device", "runtime", "streams"))
    linked = ["-std=c++17", "-shared", "-Wl,-Bsymbolic", object, "-ldl", "-lpthread"]
    _run(*CXX, *options, *sources, *linked, "-o", path)
    return path


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Driver:
    """CUDA's functions as methods, which take integers and pointers. They raise CudaError."""

    def __init__(self, path: Path | str) -> None:
        self.path, self._library = path, ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)

        def call(*arguments: object) -> None:
            # Every argument of these is a pointer or an integer, and a register holds either.
            code = function(*(ctypes.c_uint64(each) if isinstance(each, int) else each for each in arguments))
            if code:
                raise CudaError(name, code)

        return call

    def made(self, name: str, *arguments: object) -> int:
        """Call a function, and return the number that it stores where its first argument points."""
        out = ctypes.c_uint64()
        getattr(self, name)(ctypes.byref(out), *arguments)
        return out.value

    def stream(self) -> int:
        return self.made("cuStreamCreate", 1)

    def event(self) -> int:
        return self.made("cuEventCreate", 2)

    def mailbox(self, size: int) -> int:
        """Allocate pinned host memory, and return its address."""
        return self.made("cuMemHostAlloc", size, 0)

    def mailboxes(self) -> int:
        """The number of pieces of pinned memory that are allocated."""
        return self.made("standin_mailboxes")

    def flags(self) -> int:
        """Allocate sixteen 32-bit zeros in pinned host memory, and return their address."""
        memory = self.mailbox(64)
        ctypes.memset(memory, 0, 64)
        return memory

    def memory(self, size: int) -> int:
        """Allocate device memory, which the host can use too, and return its address."""
        return self.made("cuMemAlloc_v2", size)

    @contextmanager
    def capture(self, stream: int, mode: int = GLOBAL) -> Iterator[list[int]]:
        """Capture the stream's work in the block. The list then holds the executable graph."""
        executable: list[int] = []
        self.cuStreamBeginCapture_v2(stream, mode)
        graph = ctypes.c_uint64()
        try:
            yield executable
        except BaseException:
            with suppress(CudaError):  # the error of the block is the one to see
                self.cuStreamEndCapture(stream, ctypes.byref(graph))
            raise
        self.cuStreamEndCapture(stream, ctypes.byref(graph))
        executable.append(self.made("cuGraphInstantiateWithFlags", graph.value, 0))
        self.cuGraphDestroy(graph.value)


def number(address: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(address)


def real(address: int) -> ctypes.c_float:
    return ctypes.c_float.from_address(address)


class Worker:
    """A thread that answers messages in a mailbox by twice their value, until the block ends."""

    def __init__(self, mailbox: int) -> None:
        self._mailbox, self._stop = mailbox, False
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    def _work(self) -> None:
        bell, done = number(self._mailbox + BELL), number(self._mailbox + DONE)
        message, result = real(self._mailbox + MESSAGE), real(self._mailbox + RESULT)
        while not self._stop:
            if bell.value:
                bell.value = 0
                result.value = 2 * message.value
                done.value = 1
            time.sleep(0)


class CudaError(Exception):
    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function}: error {code}")
        self.function, self.code = function, code
