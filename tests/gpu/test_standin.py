"""The stand-in for CUDA: the order of its work, and the wrong values if a program acts too early.

Tests of its other parts would need a torch that is built for CUDA.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from support.jobs import ROOT
from support.ranks import once
from support.standin_driver import (
    BELL,
    DONE,
    EQ,
    GEQ,
    MESSAGE,
    RESULT,
    CudaError,
    Driver,
    HostFunction,
    Worker,
    library,
    needs_library,
    number,
    real,
)

pytestmark = [once("it is compiled"), needs_library]
_SIZE, _DEFAULT = 4096, 4
_NOT_PERMITTED, _NOT_SUPPORTED = 800, 801


@pytest.fixture
def cuda(tmp_path: Path) -> Any:
    return ctypes.CDLL(str(library(tmp_path / "late.so")))


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
    ctypes.memset(two, 3, _SIZE)  # too early: the copy from it is not done yet
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


def test_devices_and_errors(driver: Driver) -> None:
    assert driver.cuInit(0) is None
    count, text = ctypes.c_int(), ctypes.c_char_p()
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuGetErrorString(_NOT_SUPPORTED, ctypes.byref(text))
    assert (count.value, text.value) == (1, b"operation not supported")


def test_a_stream_waits_for_a_value_and_writes_one(driver: Driver) -> None:
    stream, memory = driver.stream(), driver.flags()
    driver.cuStreamWriteValue32_v2(stream, memory, 7, 0)
    driver.cuStreamWaitValue32_v2(stream, memory + 4, 1, EQ)
    driver.cuStreamWriteValue32_v2(stream, memory + 8, 8, 0)
    driver.cuStreamWaitValue32_v2(stream, memory + 4, 3, GEQ)
    driver.cuStreamWriteValue32_v2(stream, memory + 8, 9, 0)
    with pytest.raises(CudaError, match="cuStreamQuery: error 600"):
        driver.cuStreamQuery(stream)
    waiter = threading.Thread(target=driver.cuStreamSynchronize, args=[stream])
    waiter.start()
    seen = []
    for value in (1, 5):
        time.sleep(0.02)
        seen.append(number(memory + 8).value)
        number(memory + 4).value = value
    waiter.join()
    assert (seen[0], number(memory).value, number(memory + 8).value) == (0, 7, 9)
    assert seen[1] in (0, 8)
    driver.cuStreamQuery(stream)


def test_operations_in_one_call(driver: Driver) -> None:
    stream, memory = driver.stream(), driver.flags()
    wait, write, barrier = 1, 2, 6
    operations = (
        ctypes.c_uint64 * 6 * 3
    )()  # CUstreamBatchMemOpParams: operation, address, value, flags, alias
    operations[0][:4] = write, memory, 3, 0
    operations[1][0] = barrier
    operations[2][:4] = wait, memory, 3, EQ
    driver.cuStreamBatchMemOp_v2(stream, 3, operations, 0)
    driver.cuStreamSynchronize(stream)
    assert number(memory).value == 3


def test_without_memory_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPISYNCBN_STANDIN_WITHOUT", "stream_memory_operations")
    driver = Driver(library(tmp_path / "without.so"))
    stream, memory, has = driver.stream(), driver.flags(), ctypes.c_int(-1)
    driver.cuDeviceGetAttribute(ctypes.byref(has), 92, 0)
    assert has.value == 0
    for function in (driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2):
        with pytest.raises(CudaError) as caught:
            function(stream, memory, 1, 0)
        assert caught.value.code == _NOT_SUPPORTED


def test_a_host_function_comes_in_its_turn(driver: Driver) -> None:
    stream, memory, seen = driver.stream(), driver.flags(), []
    function = HostFunction(lambda _: seen.append(number(memory).value))
    for value in (1, 2):
        driver.cuStreamWriteValue32_v2(stream, memory, value, 0)
        driver.cuLaunchHostFunc(stream, function, 0)
    driver.cuStreamSynchronize(stream)
    assert seen == [1, 2]


def test_a_host_function_calls_no_cuda(driver: Driver) -> None:
    stream, memory, codes = driver.stream(), driver.flags(), []

    def call(_: object) -> None:
        for function, *arguments in ((driver.cuMemFreeHost, memory), (driver.cuStreamSynchronize, stream)):
            with pytest.raises(CudaError) as caught:
                function(*arguments)
            codes.append(caught.value.code)

    function = HostFunction(call)
    driver.cuLaunchHostFunc(stream, function, 0)
    driver.cuStreamSynchronize(stream)
    assert codes == [_NOT_PERMITTED] * 2


def test_work_is_done_even_if_the_host_never_waits(driver: Driver) -> None:
    stream, memory = driver.stream(), driver.flags()
    driver.cuStreamWriteValue32_v2(stream, memory, 1, 0)
    end = time.monotonic() + 60
    while not number(memory).value and time.monotonic() < end:
        time.sleep(0.01)
    assert number(memory).value == 1


def test_calls_that_are_timed_return_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPISYNCBN_STANDIN", "calls")
    monkeypatch.delenv("MPISYNCBN_STANDIN_ORDER", raising=False)
    driver = Driver(library(tmp_path / "calls.so"))
    stream, memory = driver.stream(), driver.flags()
    driver.cuStreamWaitValue32_v2(stream, memory, 1, EQ)
    driver.cuStreamWriteValue32_v2(stream, memory + 4, 1, 0)
    assert number(memory + 4).value == 1
    driver.cuStreamQuery(stream)  # nothing is queued, although the host has not waited


def test_a_value_in_one_stream_holds_up_the_other_by_an_event(driver: Driver) -> None:
    first, second, event, memory = driver.stream(), driver.stream(), driver.event(), driver.flags()
    driver.cuStreamWaitValue32_v2(first, memory, 1, EQ)
    driver.cuStreamWriteValue32_v2(first, memory + 4, 1, 0)
    driver.cuEventRecord(event, first)
    driver.cuStreamWaitEvent(second, event, 0)
    copied = driver.memory(4)
    driver.cuMemcpyAsync(copied, memory + 4, 4, second)
    threading.Timer(0.02, lambda: setattr(number(memory), "value", 1)).start()
    driver.cuStreamSynchronize(second)
    assert number(copied).value == 1


def test_a_value_that_never_comes_is_an_end() -> None:
    program = """
import sys
from support.standin_driver import Driver
driver = Driver(sys.argv[1])
stream, memory = driver.stream(), driver.mailbox(64)
driver.cuStreamWaitValue32_v2(stream, memory, 1, 1)
driver.cuStreamSynchronize(stream)
"""
    environment = {**os.environ, "MPISYNCBN_STANDIN_TIMEOUT": "0.05", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", program, library()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "stand-in: a stream has waited 0.05 s for the value 1" in done.stderr


@pytest.mark.parametrize("broken", ["nothing", "bell before message", "result before flag", "no event"])
def test_steps_in_the_wrong_order_are_noticed(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPISYNCBN_STANDIN_PAUSE", "5000")
    driver = Driver(library(tmp_path / "late.so"))
    stream, other, event, memory = driver.stream(), driver.stream(), driver.event(), driver.flags()
    message, result = driver.memory(4), driver.memory(4)

    def post() -> None:
        driver.cuMemcpyAsync(memory + MESSAGE, message, 4, other)
        driver.cuEventRecord(event, other)
        if broken != "no event":
            driver.cuStreamWaitEvent(stream, event, 0)

    steps = [
        post,
        lambda: driver.cuStreamWriteValue32_v2(stream, memory + BELL, 1, 0),
        lambda: driver.cuStreamWaitValue32_v2(stream, memory + DONE, 1, EQ),
        lambda: driver.cuMemcpyAsync(result, memory + RESULT, 4, stream),
        lambda: driver.cuStreamWriteValue32_v2(stream, memory + DONE, 0, 0),
    ]
    for at, rule in ((0, "bell before message"), (2, "result before flag")):
        if broken == rule:
            steps[at : at + 2] = reversed(steps[at : at + 2])
    got = []
    with Worker(memory):
        for value in range(1, 6):
            real(message).value = value
            for step in steps:
                step()
            driver.cuStreamSynchronize(stream)
            got.append(real(result).value)
    assert (got == [2.0 * value for value in range(1, 6)]) is (broken == "nothing")
