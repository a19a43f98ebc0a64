// The stand-in's streams, events, stream memory operations, captures and graphs: see device.h.
#include "device.h"

using namespace standin;

namespace {

Count captures_begun = 0;

// With Order::at_once, a doorbell that is not 0 yet is rung later, with the last value, at the latest when the host
// synchronizes, which waits until the reader has set it to 0.
struct {
    std::mutex own;
    unsigned *address = nullptr, value = 0;

    void ring(unsigned *bell, unsigned number) {
        const std::lock_guard<std::mutex> lock(own);
        address = bell, value = number;
        if (!__atomic_load_n(bell, __ATOMIC_ACQUIRE)) now();
    }
    void finish() {
        const std::lock_guard<std::mutex> lock(own);
        while (address && __atomic_load_n(address, __ATOMIC_ACQUIRE)) std::this_thread::yield();
        if (address) now();
    }

private:
    void now() { __atomic_store_n(std::exchange(address, nullptr), value, __ATOMIC_SEQ_CST); }
} later;

cudaError_t synchronize(Stream *stream, Count end) {
    {
        const Lock lock(mutex);
        if (in_host_function) return cudaErrorNotPermitted;
        if (stream->capture) return stream->capture->valid = false, cudaErrorStreamCaptureUnsupported;
    }
    if (order == Order::at_once) later.finish();
    return wait_for(stream, end), cudaSuccess;
}

Count put(Stream *stream) {
    const Lock lock(mutex);
    return stream->put;
}

bool reached(unsigned is, unsigned value, unsigned flags) {
    switch (flags & 3) {  // of CUstreamWaitValue_flags
    case 0: return (int)(is - value) >= 0;
    case 1: return is == value;
    case 2: return is & value;
    default: return ~(is | value);
    }
}

// Blocks the thread that does a stream's work until another thread has written the value; aborts after a time limit.
void await(const unsigned *address, unsigned value, unsigned flags) {
    if (order == Order::at_once) return;
    const double seconds = number("MPISYNCBN_STANDIN_TIMEOUT", 60);
    const auto begun = Clock::now();
    for (unsigned turn = 0; !reached(__atomic_load_n(address, __ATOMIC_ACQUIRE), value, flags); ++turn) {
        if (turn < 100)
            std::this_thread::yield();
        else
            std::this_thread::sleep_for(std::chrono::microseconds(20));
        if (std::chrono::duration<double>(Clock::now() - begun).count() < seconds) continue;
        fprintf(stderr, "stand-in: a stream has waited %g s for the value %u at %p, which is %u\n", seconds, value,
                (const void *)address, *address);
        abort();
    }
}

bool all_joined(const Capture &capture) {
    for (const Stream *member : capture.members)
        if (member != capture.origin && member->joined != member->captured) return false;
    return true;
}

}  // namespace

// Streams
ENTRY cudaStreamCreateWithPriority(cudaStream_t *out, unsigned, int) {
    const Lock lock(mutex);
    auto *stream = new Stream;
    streams.insert(stream);
    return *out = (cudaStream_t)stream, cudaSuccess;
}
ENTRY cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, 0, 0); }
ENTRY cudaStreamSynchronize(cudaStream_t stream) { return synchronize(of(stream), put(of(stream))); }
ENTRY cudaStreamDestroy(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
ENTRY cudaStreamQuery(cudaStream_t stream) {
    const Lock lock(mutex);
    const Stream *asked = of(stream);
    if (asked->capture) return asked->capture->valid = false, cudaErrorStreamCaptureUnsupported;
    return asked->done == asked->put ? cudaSuccess : cudaErrorNotReady;
}
ENTRY cudaStreamGetPriority(cudaStream_t, int *out) { return *out = 0, cudaSuccess; }
ENTRY cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    Lock lock(mutex);
    return of(stream)->add(lock, [=] { call(function, data); });
}
ENTRY standin_call(cudaStream_t stream, cudaHostFn_t function) {  // it may be in Python, whose garbage collector may call CUDA
    Lock lock(mutex);
    return of(stream)->add(lock, [=] { function(nullptr); });
}
ENTRY standin_wait_value(cudaStream_t stream, const unsigned *address, unsigned value, unsigned flags) {
    Lock lock(mutex);
    return of(stream)->add(lock, [=] { await(address, value, flags); });
}
ENTRY standin_write_value(cudaStream_t stream, unsigned *address, unsigned value) {
    Lock lock(mutex);
    return of(stream)->add(lock, [=] {
        if (order == Order::at_once && value)
            later.ring(address, value);
        else
            __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
    });
}

// Events
ENTRY cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    Lock lock(mutex);
    Stream *waits = of(stream);
    const Event awaited = *(Event *)event;
    if (!awaited.capture) {
        if (!awaited.stream) return cudaSuccess;
        if (waits->capture) return waits->capture->valid = false, cudaErrorStreamCaptureIsolation;
        return waits->add(lock, [=] {
            Lock inside(mutex);
            awaited.stream->until(inside, awaited.at);
        });
    }
    if (!captures.count(awaited.capture.get())) return cudaErrorCapturedEvent;
    if (waits->capture && waits->capture != awaited.capture) {
        waits->capture->valid = awaited.capture->valid = false;
        return cudaErrorStreamCaptureMerge;
    }
    if (!waits->capture) waits->captured = waits->joined = 0;
    waits->capture = awaited.capture;
    waits->capture->members.insert(waits);
    if (awaited.stream != waits && awaited.at > awaited.stream->joined) awaited.stream->joined = awaited.at;
    return waits->add(lock, nullptr);
}
ENTRY cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) { return *out = (cudaEvent_t) new Event, cudaSuccess; }
ENTRY cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
NOTHING(cudaEventDestroy, cudaEvent_t)
ENTRY cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    Lock lock(mutex);
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    Stream *records = of(stream);
    if (!records->capture)
        if (const cudaError_t error = records->add(lock, nullptr)) return error;
    *(Event *)event = {records, records->capture ? records->captured : records->put,
                       std::chrono::duration<double, std::milli>(now).count(), records->capture};
    return cudaSuccess;
}
ENTRY cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
ENTRY cudaEventQuery(cudaEvent_t event) {
    const Lock lock(mutex);
    const Event *asked = (Event *)event;
    if (const cudaError_t error = refused()) return error;
    if (asked->capture) return cudaErrorCapturedEvent;
    return !asked->stream || asked->stream->done >= asked->at ? cudaSuccess : cudaErrorNotReady;
}
ENTRY cudaEventSynchronize(cudaEvent_t event) {
    Lock lock(mutex);
    const Event awaited = *(Event *)event;
    lock.unlock();
    if (awaited.capture) return cudaErrorCapturedEvent;
    if (awaited.stream) wait_for(awaited.stream, awaited.at);
    return cudaSuccess;
}
ENTRY cudaEventElapsedTime(float *out, cudaEvent_t begin, cudaEvent_t end) {
    return *out = ((Event *)end)->when - ((Event *)begin)->when + 1e-3, cudaSuccess;
}

// Captures
ENTRY cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    const Lock lock(mutex);
    Stream *origin = of(stream);
    if (origin->capture || origin == &default_stream) return cudaErrorStreamCaptureUnsupported;
    origin->capture = std::make_shared<Capture>(
        Capture{origin, new Graph(new Recorded), mode, std::this_thread::get_id(), ++captures_begun});
    origin->capture->members.insert(origin);
    origin->captured = 0;
    captures.insert(origin->capture.get());
    return cudaSuccess;
}
ENTRY cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    *out = nullptr;
    Lock lock(mutex);
    const auto capture = of(stream)->capture;
    if (!capture) return cudaErrorIllegalState;
    if (capture->origin != of(stream)) return cudaErrorStreamCaptureUnmatched;
    if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
        return cudaErrorStreamCaptureWrongThread;
    const bool joined = all_joined(*capture);
    for (Stream *member : capture->members) member->capture = nullptr;
    captures.erase(capture.get());
    if (capture->valid && joined) return *out = (cudaGraph_t)capture->graph, cudaSuccess;
    lock.unlock();
    delete capture->graph;
    return capture->valid ? cudaErrorStreamCaptureUnjoined : cudaErrorStreamCaptureInvalidated;
}
ENTRY standin_capture_info(cudaStream_t stream, cudaStreamCaptureStatus *out, Count *number, cudaGraph_t *graph) {
    const Lock lock(mutex);
    const auto capture = of(stream)->capture;
    *out = !capture          ? cudaStreamCaptureStatusNone
           : capture->valid ? cudaStreamCaptureStatusActive
                            : cudaStreamCaptureStatusInvalidated;
    if (capture && number) *number = capture->number;
    if (capture && graph) *graph = (cudaGraph_t)capture->graph;
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
#define EDGES const cudaGraphEdgeData **,
#else
#define EDGES
#endif
ENTRY cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *out, unsigned long long *number,
                               cudaGraph_t *graph, const cudaGraphNode_t **, EDGES size_t *) {
    return standin_capture_info(stream, out, number, graph);
}
ENTRY cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *out) {
    return standin_capture_info(stream, out, nullptr, nullptr);
}
ENTRY cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
    return std::swap(*mode, thread_mode), cudaSuccess;
}

// Graphs: recorded work is done in the order in which it was enqueued, whatever its streams
ENTRY cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long) {
    return *out = (cudaGraphExec_t) new Graph(*(Graph *)graph), cudaSuccess;
}
ENTRY cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(out, graph, flags);
}
ENTRY cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    Lock lock(mutex);
    return of(stream)->add(lock, [graph = *(Graph *)executable] {
        for (const Work &work : graph->nodes)
            if (work) work();
    });
}
NOTHING(cudaGraphUpload, cudaGraphExec_t, cudaStream_t)
ENTRY cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *out) {
    return *out = (*(Graph *)graph)->nodes.size(), cudaSuccess;
}
ENTRY cudaGraphDestroy(cudaGraph_t graph) { return delete (Graph *)graph, cudaSuccess; }
ENTRY cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete (Graph *)executable, cudaSuccess; }

// User objects
ENTRY cudaUserObjectCreate(cudaUserObject_t *out, void *data, cudaHostFn_t destroy, unsigned references, unsigned flags) {
    if (flags != cudaUserObjectNoDestructorSync) return cudaErrorInvalidValue;
    return *out = (cudaUserObject_t) new UserObject{destroy, data, references}, cudaSuccess;
}
ENTRY cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
    return drop((UserObject *)object, count), cudaSuccess;
}
ENTRY cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) {
    const Lock lock(mutex);
    (*(Graph *)graph)->retained[(UserObject *)object] += count;
    if (!(flags & cudaGraphUserObjectMove)) ((UserObject *)object)->references += count;
    return cudaSuccess;
}
