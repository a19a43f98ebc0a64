"""The stand-in for CUDA's runtime: it is as late as it says. The rest of it needs a torch built for CUDA."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from support.jobs import ROOT
from support.ranks import once

triton = pytest.importorskip("triton")
FOLDER = ROOT / "tests" / "support" / "standin"
HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
CXX = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")
pytestmark = [
    once("it is compiled"),
    pytest.mark.skipif(not HEADERS.is_dir(), reason="this Triton brings no headers of CUDA"),
    pytest.mark.skipif(not shutil.which(CXX[0]), reason="no C++ compiler"),
]
_SIZE, _DEFAULT = 4096, 4


def compiled(source: str, folder: Path, *options: str) -> Any:
    path = folder / f"lib{source}.so"
    command = [*CXX, "-shared", "-fPIC", f"-I{HEADERS}", "-o", path, *options, FOLDER / source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


@pytest.fixture
def cuda(tmp_path: Path) -> Any:
    return compiled("runtime.cpp", tmp_path, "-std=c++17", "-ldl")


def made(function: Any, *arguments: Any) -> ctypes.c_void_p:
    out = ctypes.c_void_p()
    assert function(ctypes.byref(out), *arguments) == 0
    return out


def filled(cuda: Any, value: int) -> ctypes.c_void_p:
    memory = made(cuda.cudaHostAlloc, ctypes.c_size_t(_SIZE), 0)
    ctypes.memset(memory, value, _SIZE)
    return memory


def copy(cuda: Any, to: Any, from_: Any, stream: Any) -> None:
    assert cuda.cudaMemcpyAsync(to, from_, ctypes.c_size_t(_SIZE), _DEFAULT, stream) == 0


def values(memory: ctypes.c_void_p) -> set[int]:
    return set(ctypes.string_at(memory, _SIZE))


def test_copies_are_late(cuda: Any) -> None:
    stream, event = made(cuda.cudaStreamCreate), made(cuda.cudaEventCreate)
    one, two, got = filled(cuda, 1), filled(cuda, 2), filled(cuda, 0)
    there = made(cuda.cudaMalloc, ctypes.c_size_t(_SIZE))
    copy(cuda, there, one, stream)
    cuda.cudaEventRecord(event, stream)
    copy(cuda, there, two, stream)
    copy(cuda, got, there, stream)
    assert values(there) == {0xA5}
    assert cuda.cudaEventQuery(event) != 0
    cuda.cudaEventSynchronize(event)
    assert (values(there), values(got)) == ({1}, {0})
    ctypes.memset(two, 3, _SIZE)  # too early
    cuda.cudaStreamSynchronize(stream)
    assert values(got) == {3}


def test_one_stream_waits_for_another(cuda: Any) -> None:
    streams, event = [made(cuda.cudaStreamCreate) for _ in range(2)], made(cuda.cudaEventCreate)
    one, got = filled(cuda, 1), filled(cuda, 0)
    there = made(cuda.cudaMalloc, ctypes.c_size_t(_SIZE))
    copy(cuda, there, one, streams[0])
    cuda.cudaEventRecord(event, streams[0])
    cuda.cudaStreamWaitEvent(streams[1], event, 0)
    copy(cuda, got, there, streams[1])
    cuda.cudaStreamSynchronize(streams[1])
    assert values(got) == {1}


def test_memory_that_is_not_pinned(cuda: Any) -> None:
    there = made(cuda.cudaMalloc, ctypes.c_size_t(_SIZE))
    copy(cuda, there, ctypes.create_string_buffer(b"\7" * _SIZE, _SIZE), None)
    assert values(there) == {7}


def test_the_driver(tmp_path: Path) -> None:
    driver = compiled("driver.c", tmp_path, "-xc")
    count = ctypes.c_int()
    assert driver.cuInit(0) == driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    assert count.value == 1
