"""The stream transport on two devices, in threads, and on streams that CUDA treats apart.

A library between the worker and the stand-in refuses what CUDA's driver refuses: a call without a
current context, a stream and an event of two contexts, a stream that has been destroyed. Stream 0
is the default stream of the current context, and stream 2 that of the thread.
"""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from mpisyncbn.kernels import native
from support import stream_shim
from support.ranks import once
from support.standin_driver import THREAD, Driver, library
from support.stream_device import StreamDevice, needs_standin
from support.stream_shim import Sent, drain

pytestmark = [needs_standin, once("no rank meets another in it")]
CONTEXTS = """
#include <map>
#include <mutex>
static std::mutex mutex;
static thread_local CUcontext current;
extern "C" CUcontext waited_in = nullptr;
static std::map<CUcontext, CUstream> defaults;
static thread_local std::map<CUcontext, CUstream> of_thread;
static std::map<CUstream, CUcontext> streams;
static std::map<CUevent, CUcontext> events;

static CUresult make(CUstream *out) {
    CUresult error = REAL(cuStreamCreate)(out, 1);
    streams[*out] = current;
    return error;
}
// The stand-in's stream for a number, in the thread's context; an error for one that is not there.
static CUresult find(CUstream &stream) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    const std::lock_guard<std::mutex> lock(mutex);
    CUstream &found = stream == (CUstream)2 ? of_thread[current] : stream ? stream : defaults[current];
    if (!found) make(&found);
    stream = found;
    return streams.count(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
#define FIND(stream) if (CUresult error = find(stream)) return error

ENTRY cuCtxGetCurrent(CUcontext *out) { return *out = current, CUDA_SUCCESS; }
ENTRY cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
ENTRY cuCtxGetDevice(CUdevice *out) {
    return *out = (CUdevice)((long)current - 0x100), current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
ENTRY cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) {
    return *out = (CUcontext)(0x100L + device), CUDA_SUCCESS;
}
ENTRY cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    return current ? REAL(cuMemHostAlloc)(out, bytes, flags) : CUDA_ERROR_INVALID_CONTEXT;
}
ENTRY cuStreamCreate(CUstream *out, unsigned) { return make(out); }
ENTRY cuStreamDestroy_v2(CUstream stream) { return streams.erase(stream), CUDA_SUCCESS; }
ENTRY cuEventCreate(CUevent *out, unsigned flags) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    CUresult error = REAL(cuEventCreate)(out, flags);
    return events[*out] = current, error;
}
ENTRY cuEventRecord(CUevent event, CUstream stream) {
    FIND(stream);
    return events[event] == streams[stream] ? REAL(cuEventRecord)(event, stream) : CUDA_ERROR_INVALID_HANDLE;
}
ENTRY cuEventSynchronize(CUevent event) {
    waited_in = current;
    return REAL(cuEventSynchronize)(event);
}
ENTRY cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    FIND(stream);
    return REAL(cuStreamWaitEvent)(stream, event, flags);
}
ENTRY cuStreamSynchronize(CUstream stream) {
    FIND(stream);
    waited_in = current;
    return REAL(cuStreamSynchronize)(stream);
}
ENTRY cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    FIND(stream);
    return REAL(cuMemcpyAsync)(to, from, bytes, stream);
}
ENTRY cuStreamBatchMemOp_v2(CUstream stream, unsigned count, CUstreamBatchMemOpParams *all, unsigned flags) {
    FIND(stream);
    return REAL(cuStreamBatchMemOp_v2)(stream, count, all, flags);
}
ENTRY cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus *out, cuuint64_t *number,
                                CUgraph *graph, const CUgraphNode **nodes, size_t *edges) {
    FIND(stream);
    return REAL(cuStreamGetCaptureInfo_v2)(stream, out, number, graph, nodes, edges);
}
"""


class Devices:
    """Two devices, and a group of one rank whose worker makes exchanges on them."""

    def __init__(self, path):
        self.driver, self.memory, self.sent = Driver(path), StreamDevice(Driver(library()), False), Sent()
        self.worker = native().StreamWorker(str(path), self.sent.address, 0, 0, 0, 0, 0, False, 1, 0)
        self.expected, self.outs = [], []

    def use(self, device):
        """Make a device the current one of this thread, as torch.cuda.set_device does."""
        self.driver.cuCtxSetCurrent(0x100 + device)

    def exchange(self, device, stream=0):
        number = float(len(self.expected))
        message, out = self.memory.put([number]), self.memory.memory(1).fill_(torch.nan)
        call = native().Call(2, 0, 1, 5, 0, 0.0, 0.0)
        self.worker.enqueue(
            (device, stream), call, 0, None, None, [message.data_ptr()], out.data_ptr(), None, ()
        )
        self.expected.append(number)
        self.outs.append(out)

    def synchronize(self, device, stream=0):
        self.use(device)
        self.driver.cuStreamSynchronize(stream)

    def check(self):
        """Every message was sent in order, and every result is on its device."""
        drain(self.worker)
        assert [value for _, value in self.sent.messages] == self.expected
        assert [out.item() for out in self.outs] == self.expected


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return stream_shim.built(CONTEXTS, tmp_path_factory.mktemp("contexts"))


@pytest.fixture
def devices(path):
    return Devices(path)


def in_thread(run):
    """Run a function in a new thread, which has no context. Return its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    assert results, "the thread raised an exception"
    return results[0]


def test_default_streams_of_two_devices_keep_the_order(devices):
    for device in (0, 1, 0, 1, 1, 0):
        devices.use(device)
        devices.exchange(device)
    devices.synchronize(1)
    devices.synchronize(0)
    devices.check()


@pytest.mark.parametrize("current", [0, 1])
def test_the_current_device_need_not_be_that_of_the_exchange(current, devices):
    devices.use(current)
    devices.exchange(0)
    devices.exchange(1)
    here = devices.driver.made("cuCtxGetCurrent")
    devices.synchronize(1)
    devices.synchronize(0)
    devices.check()
    assert here == 0x100 + current


def test_a_thread_without_a_context(devices):
    """Its first exchange is on its own device, which need not be that of the group's last one."""

    def exchange():
        devices.exchange(0)
        return devices.driver.made("cuCtxGetCurrent")

    assert in_thread(exchange) == 0
    devices.use(1)
    devices.exchange(1)
    assert in_thread(exchange) == 0
    devices.synchronize(1)
    devices.synchronize(0)
    devices.check()


@pytest.mark.parametrize("stream", [0, 2])
def test_a_wait_on_another_device(stream, devices, path):
    devices.use(1)
    devices.exchange(1, stream)
    devices.use(0)
    devices.worker.wait()
    assert ctypes.c_void_p.in_dll(ctypes.CDLL(path), "waited_in").value == 0x101
    devices.check()


def test_the_last_stream_is_being_captured(devices):
    """An event of it would be captured, so the host waits for the exchange before."""
    devices.use(0)
    captured, other = devices.driver.stream(), devices.driver.stream()
    devices.exchange(0, captured)
    devices.driver.cuStreamSynchronize(captured)
    with devices.driver.capture(captured, THREAD):
        devices.exchange(0, other)
    devices.driver.cuStreamSynchronize(other)
    devices.worker.wait()
    devices.check()


def test_streams_that_have_one_number_in_all_threads(devices):
    """CuPy's per-thread default stream is number 2 in every thread: one must wait for another's."""
    devices.use(0)
    devices.exchange(0, 2)

    def exchange():
        devices.use(0)
        devices.exchange(0, 2)
        devices.driver.cuStreamSynchronize(2)
        return True

    assert in_thread(exchange)
    devices.exchange(0, 2)
    devices.driver.cuStreamSynchronize(2)
    devices.check()
