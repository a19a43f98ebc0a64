"""The stream transport depends on rules of order. If one is broken, the test must notice.

A library between the worker and a stand-in for CUDA's driver breaks one rule in a test. To make
this visible, the stand-in runs a stream when the host waits for it, is slow to copy a message, and
overwrites a result with NaN once it has been copied.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest

from mpisyncbn.kernels import native
from support import stream_shim
from support.device import GPU
from support.ranks import once
from support.standin_driver import Driver, library
from support.stream_device import StreamDevice, needs_standin
from support.stream_shim import Sent, drain

pytestmark = [
    needs_standin,
    once("no rank meets another in it"),
    pytest.mark.skipif(GPU, reason="scripts/gpu_check has its own"),
]
HELD = """
using Operations = CUstreamBatchMemOpParams;
static CUdeviceptr held_to, held_from;
static size_t held;
static bool rung;
"""


class Rule(NamedTuple):
    keeps: str
    broken: str  # C++ that breaks it
    shows: str  # a problem that must be found then, perhaps among others


def without(place):
    """Return C++ that leaves out an operation: ring, wait for the flag, reset the flag."""
    return f"""
ENTRY cuStreamBatchMemOp_v2(CUstream stream, unsigned count, Operations *operations, unsigned flags) {{
    for (unsigned i = 0; i < count; ++i)
        if (i != {place})
            if (CUresult error = REAL(cuStreamBatchMemOp_v2)(stream, 1, operations + i, flags)) return error;
    return CUDA_SUCCESS;
}}"""


RULES = {
    "none is broken": Rule("", "", ""),
    "an exchange waits for the one before": Rule(
        "on another stream, by an event",
        "ENTRY cuStreamWaitEvent(CUstream, CUevent, unsigned) { return CUDA_SUCCESS; }",
        "order",
    ),
    "the event comes after the one before": Rule(
        "it is recorded once more for each exchange",
        "ENTRY cuEventRecord(CUevent, CUstream) { return CUDA_SUCCESS; }",
        "order",
    ),
    "the message comes before the bell": Rule(
        "the worker reads it as soon as it hears the bell",
        """
ENTRY cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    if (rung) return rung = false, REAL(cuMemcpyAsync)(to, from, bytes, stream);
    return held_to = to, held_from = from, held = bytes, CUDA_SUCCESS;
}
ENTRY cuStreamBatchMemOp_v2(CUstream stream, unsigned count, Operations *operations, unsigned flags) {
    REAL(cuStreamBatchMemOp_v2)(stream, 1, operations, flags);
    REAL(cuMemcpyAsync)(held_to, held_from, held, stream);
    return rung = true, REAL(cuStreamBatchMemOp_v2)(stream, count - 1, operations + 1, flags);
}""",
        "sent",
    ),
    "the stream waits for the flag": Rule("the result is there then", without(1), "results"),
    "the flag is reset": Rule("else the next wait for it is none", without(2), "results"),
    "a graph owns its slots": Rule(
        "until it is destroyed",
        """
static CUhostFn destroy;
static void *owner;
ENTRY cuUserObjectCreate(CUuserObject *, void *data, CUhostFn function, unsigned, unsigned) {
    return owner = data, destroy = function, CUDA_SUCCESS;
}
ENTRY cuGraphRetainUserObject(CUgraph, CUuserObject, unsigned, unsigned) {
    return destroy(owner), CUDA_SUCCESS;
}""",
        "replayed",
    ),
    "an exchange in a capture is not enqueued": Rule(
        "it comes with each replay",
        """
ENTRY cuStreamGetCaptureInfo_v2(CUstream, CUstreamCaptureStatus *out, cuuint64_t *, CUgraph *,
                                const CUgraphNode **, size_t *) {
    return *out = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}""",
        "captured",
    ),
    "no event crosses the border of a capture": Rule(
        "the driver refuses it",
        """
ENTRY cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus *out, cuuint64_t *number,
                                CUgraph *graph, const CUgraphNode **nodes, size_t *edges) {
    CUresult error = REAL(cuStreamGetCaptureInfo_v2)(stream, out, number, graph, nodes, edges);
    return *number = 0, error;
}""",
        "raises: cuStreamWaitEvent",
    ),
    "pinned memory is made in a relaxed mode": Rule(
        "a capture, even another thread's, forbids it otherwise",
        "ENTRY cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *) { return CUDA_SUCCESS; }",
        "raises: cuMemHostAlloc",
    ),
}


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


@pytest.fixture
def shim(rule, tmp_path):
    """Build a driver in which the rule is broken. Return its path."""
    return stream_shim.built(HELD + RULES[rule].broken, tmp_path)


def test_a_broken_rule_shows(rule, shim, monkeypatch):
    monkeypatch.setenv("MPISYNCBN_STANDIN_PAUSE", "5000")
    device, sent = StreamDevice(Driver(library()), waits=False), Sent()
    worker = native().StreamWorker(str(shim), sent.address, 0, 0, 0, 0, 0, False, 1, 0)
    other, last = device.driver.stream(), device.driver.stream()

    def enqueue(stream, number, name=5):
        message, out = device.put([number]), device.memory(1)
        call = native().Call(2, 0, 1, name, 0, 0.0, 0.0)
        worker.enqueue((0, stream), call, 0, None, None, [message.data_ptr()], out.data_ptr(), None, ())
        return out

    def eager():
        """Return the problems of exchanges on streams that are synchronized in another order."""
        streams, numbers = (other, device.stream, other, device.stream, last), [0.0, 1.0, 2.0, 3.0, 4.0]
        before, outs = len(sent.messages), [enqueue(*each) for each in zip(streams, numbers, strict=True)]
        for stream in (device.stream, other, last):
            device.driver.cuStreamSynchronize(stream)
        results, messages = [out.item() for out in outs], [value for _, value in sent.messages[before:]]
        if sorted(messages) == numbers != messages:
            return ["order"]
        return ["sent"] * (messages != numbers) + ["results"] * (results != numbers)

    found = eager() or eager() or eager() or in_graphs(device, worker, sent, (other, last), enqueue)
    enqueue(last, 0)  # performed last, so that none counts as pending and the worker can end
    device.driver.cuStreamSynchronize(last)
    drain(worker)
    assert RULES[rule].shows in found if RULES[rule].shows else found == []


def in_graphs(device, worker, sent, others, enqueue):
    """Return the problems of two graphs, captured after an exchange on this or another stream.

    The graphs are replayed while an exchange on a third stream is pending.
    """
    other, last = others
    graphs, found = [], []
    for stream, name in ((device.stream, 6), (other, 7)):
        enqueue(stream, 0)
        device.driver.cuStreamSynchronize(stream)
        pending = worker.pending
        try:
            with device.driver.capture(device.stream) as graph:
                enqueue(device.stream, name, name)
        except RuntimeError as error:
            device.driver._library.cuStreamEndCapture(
                ctypes.c_void_p(device.stream), ctypes.byref(ctypes.c_void_p())
            )
            return [*found, f"raises: {str(error).partition(':')[0]}"]
        graphs += graph
        found += ["captured"] * (worker.pending != pending)
    fingerprints = []
    enqueue(last, 0)  # keeps the worker awake, even if it does not know of the graphs
    for number, name in enumerate((6, 7)):
        begun = worker.exchanges
        device.driver.cuGraphLaunch(graphs[number], device.stream)
        device.driver.cuStreamSynchronize(device.stream)
        fingerprints.append((sent.messages[-1][0], float((name + (begun + 1) * 40503) % (1 << 18))))
        device.driver.cuGraphExecDestroy(graphs[number])
    device.driver.cuStreamSynchronize(last)
    return found + ["replayed"] * any(ours != right for ours, right in fingerprints)
