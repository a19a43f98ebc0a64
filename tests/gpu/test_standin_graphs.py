"""The stand-in for CUDA: captures and replays of graphs, and the calls that a capture forbids."""

from __future__ import annotations

import ctypes

import pytest

from support.ranks import once
from support.standin_driver import (
    BELL,
    DONE,
    EQ,
    GLOBAL,
    MESSAGE,
    MOVE,
    RELAXED,
    RESULT,
    CudaError,
    Driver,
    HostFunction,
    Worker,
    needs_library,
    number,
    real,
)

pytestmark = [once("it is compiled"), needs_library]
_CAPTURING, _INVALIDATED, _UNJOINED, _ISOLATION, _CAPTURED = 900, 901, 904, 905, 907


def test_a_graph_is_replayed(driver: Driver) -> None:
    stream, other, memory, seen = driver.stream(), driver.stream(), driver.flags(), []
    event, joined = driver.event(), driver.event()
    message, result = driver.memory(4), driver.memory(4)
    function = HostFunction(lambda _: seen.append(real(result).value))
    with driver.capture(stream) as graph:
        driver.cuMemcpyAsync(memory + MESSAGE, message, 4, stream)
        driver.cuEventRecord(event, stream)
        driver.cuStreamWaitEvent(other, event, 0)
        driver.cuStreamWriteValue32_v2(other, memory + BELL, 1, 0)
        driver.cuEventRecord(joined, other)
        driver.cuStreamWaitEvent(stream, joined, 0)
        driver.cuStreamWaitValue32_v2(stream, memory + DONE, 1, EQ)
        driver.cuStreamWriteValue32_v2(stream, memory + DONE, 0, 0)
        driver.cuMemcpyAsync(result, memory + RESULT, 4, stream)
        driver.cuLaunchHostFunc(stream, function, 0)
        driver.cuLaunchKernel(256, 1, 1, 1, 1, 1, 1, 0, stream, 0, 0)
    assert number(memory + BELL).value == 0
    with Worker(memory):
        for value in range(100):
            real(message).value = value
            driver.cuGraphLaunch(graph[0], stream)
            driver.cuStreamSynchronize(stream)
    assert seen == [2.0 * value for value in range(100)]


def test_calls_that_a_capture_forbids(driver: Driver) -> None:
    stream, other, event, elsewhere = driver.stream(), driver.stream(), driver.event(), driver.event()

    def refused(code: int, name: str, *arguments: object) -> None:
        with pytest.raises(CudaError) as caught:
            getattr(driver, name)(*arguments)
        assert (caught.value.function, caught.value.code) == (name, code)

    out, number, graph, status = *(ctypes.c_uint64() for _ in range(3)), ctypes.c_int()
    driver.cuEventRecord(elsewhere, other)
    for name, *arguments in (
        ["cuMemHostAlloc", ctypes.byref(out), 64, 0],
        ["cuStreamSynchronize", stream],
        ["cuEventQuery", elsewhere],
    ):
        driver.cuStreamBeginCapture_v2(stream, GLOBAL)
        refused(_CAPTURING, name, *arguments)
        refused(_INVALIDATED, "cuStreamEndCapture", stream, ctypes.byref(out))
    driver.cuStreamBeginCapture_v2(stream, GLOBAL)
    refused(_ISOLATION, "cuStreamWaitEvent", stream, elsewhere, 0)
    refused(_INVALIDATED, "cuStreamEndCapture", stream, ctypes.byref(out))
    driver.cuStreamBeginCapture_v2(stream, GLOBAL)
    driver.cuEventRecord(event, stream)
    driver.cuStreamWaitEvent(other, event, 0)
    refused(_UNJOINED, "cuStreamEndCapture", stream, ctypes.byref(out))
    refused(_CAPTURED, "cuEventQuery", event)
    mode = ctypes.c_int(RELAXED)
    with driver.capture(stream):
        driver.cuStreamGetCaptureInfo_v2(stream, *map(ctypes.byref, (status, number, graph)), 0, 0)
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        driver.mailbox(64)
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert (status.value, number.value, mode.value) == (1, 6, RELAXED)
    assert graph.value


@pytest.mark.parametrize("last", ["graph", "executable"])
def test_an_object_lives_as_long_as_its_graph(driver: Driver, last: str) -> None:
    stream, gone, graph = driver.stream(), [], ctypes.c_uint64()
    destroyed = HostFunction(gone.append)
    driver.cuStreamBeginCapture_v2(stream, GLOBAL)
    driver.cuStreamGetCaptureInfo_v2(
        stream, ctypes.byref(ctypes.c_int()), 0, ctypes.byref(graph), 0, ctypes.byref(ctypes.c_uint64())
    )
    thing = driver.made("cuUserObjectCreate", 11, destroyed, 1, 1)
    driver.cuGraphRetainUserObject(graph.value, thing, 1, MOVE)
    driver.cuStreamEndCapture(stream, ctypes.byref(graph))
    executable = driver.made("cuGraphInstantiateWithFlags", graph.value, 0)
    driver.cuGraphLaunch(executable, stream)
    ends = [lambda: driver.cuGraphExecDestroy(executable), lambda: driver.cuGraphDestroy(graph.value)]
    for end in ends if last == "graph" else reversed(ends):
        assert gone == []
        driver.cuStreamSynchronize(stream)
        end()
    assert gone == [11]
