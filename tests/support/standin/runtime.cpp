// A stand-in for CUDA's runtime, preloaded before libcudart: the memory of its device is that of the host, copies happen
// as late as they may, and kernels do nothing. With it a torch that is built for CUDA takes all its ways on a machine
// that has no GPU: see scripts/standin.
//
// A stream is a queue of what it was told to do. It is worked off when somebody waits for it, or for an event in it, and
// not before: who reads without waiting reads what was there earlier.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>

#define ENTRY extern "C" __attribute__((visibility("default"))) cudaError_t
#define NOTHING(name, ...) ENTRY name(__VA_ARGS__) { return cudaSuccess; }

namespace {

struct Stream {
    std::deque<std::function<void()>> queue;
    unsigned long long begun = 0, put = 0;

    void add(std::function<void()> work) { queue.push_back(std::move(work)), ++put; }
    void run_until(unsigned long long end) {
        while (begun < end && !queue.empty()) {
            const auto work = std::move(queue.front());
            queue.pop_front(), ++begun;
            if (work) work();
        }
    }
    void run() { run_until(put); }
};

struct Event {
    Stream *stream = nullptr;
    unsigned long long at = 0;
    double when = 0;  // milliseconds, of the host
};

struct Block {
    size_t bytes;
    cudaMemoryType type;
    int device;
};

std::recursive_mutex mutex;
#define LOCK const std::lock_guard<std::recursive_mutex> lock(mutex)

// Never destroyed: torch calls until the very end.
auto &blocks = *new std::map<char *, Block>;
auto &streams = *new std::map<Stream *, int>;
Stream default_stream;
thread_local int current_device = 0;
cudaStream_t captured = nullptr;
bool capturing = false;

Stream *of(cudaStream_t stream) { return (size_t)stream <= 2 ? &default_stream : (Stream *)stream; }

Block *find(const void *pointer) {
    auto found = blocks.upper_bound((char *)pointer);
    if (found == blocks.begin()) return nullptr;
    --found;
    return (char *)pointer < found->first + found->second.bytes ? &found->second : nullptr;
}

void run_everything() {
    default_stream.run();
    for (auto &[stream, device] : streams) stream->run();
}

cudaError_t allocate(void **out, size_t bytes, cudaMemoryType type) {
    LOCK;
    bytes = (bytes / 512 + 1) * 512;
    if (!(*out = aligned_alloc(512, bytes))) return cudaErrorMemoryAllocation;
    memset(*out, 0xA5, bytes);
    blocks[(char *)*out] = {bytes, type, current_device};
    return cudaSuccess;
}

cudaError_t release(void *pointer) {
    LOCK;
    run_everything();  // as cudaFree waits
    blocks.erase((char *)pointer);
    free(pointer);
    return cudaSuccess;
}

cudaError_t started(cudaStream_t stream) {
    LOCK;
    of(stream)->add(nullptr);
    return cudaSuccess;
}

void capture_status(cudaStream_t stream, cudaStreamCaptureStatus *out) {
    *out = capturing && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

template <class Handle>
cudaError_t handle(Handle *out) {
    *out = (Handle) new char;
    return cudaSuccess;
}

int device_count() {
    const char *number = getenv("MPISYNCBN_STANDIN_DEVICES");
    return number ? atoi(number) : 1;
}

}  // namespace

// Devices: what torch and Triton ask of an H200
ENTRY cudaGetDeviceCount(int *out) { return *out = device_count(), cudaSuccess; }
ENTRY cudaGetDevice(int *out) { return *out = current_device, cudaSuccess; }
ENTRY cudaSetDevice(int device) {
    if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
    return current_device = device, cudaSuccess;
}
ENTRY cudaGetDeviceProperties(cudaDeviceProp *out, int) {
    memset(out, 0, sizeof *out);
    strcpy(out->name, "a stand-in, no GPU");
    out->totalGlobalMem = 8ull << 30, out->major = 9, out->multiProcessorCount = 132, out->l2CacheSize = 1 << 20;
    out->warpSize = 32, out->maxThreadsPerBlock = 1024, out->maxThreadsPerMultiProcessor = 2048;
    out->regsPerBlock = 65536, out->unifiedAddressing = 1;
    out->sharedMemPerBlock = 49152, out->sharedMemPerBlockOptin = 232448, out->sharedMemPerMultiprocessor = 233472;
    out->maxGridSize[0] = 2147483647, out->maxGridSize[1] = out->maxGridSize[2] = 65535;
    out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024, out->maxThreadsDim[2] = 64;
    return cudaSuccess;
}
ENTRY cudaDeviceGetAttribute(int *out, cudaDeviceAttr attribute, int) {
    static const std::map<int, int> known = {
        {cudaDevAttrMultiProcessorCount, 132},          {cudaDevAttrComputeCapabilityMajor, 9}, {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448}, {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    };
    const auto found = known.find(attribute);
    return *out = found == known.end() ? 0 : found->second, cudaSuccess;
}
ENTRY cudaDeviceCanAccessPeer(int *out, int, int) { return *out = 0, cudaSuccess; }
ENTRY cudaDeviceGetPCIBusId(char *out, int length, int device) {
    return snprintf(out, length, "0000:00:%02x.0", device), cudaSuccess;
}
ENTRY cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
ENTRY cudaDriverGetVersion(int *out) { return *out = 13000, cudaSuccess; }
ENTRY cudaRuntimeGetVersion(int *out) { return *out = 13000, cudaSuccess; }
ENTRY cudaDeviceSynchronize() {
    LOCK;
    return run_everything(), cudaSuccess;
}
ENTRY cudaMemGetInfo(size_t *free, size_t *total) { return *free = 7ull << 30, *total = 8ull << 30, cudaSuccess; }
NOTHING(cudaDeviceEnablePeerAccess, int, unsigned)
NOTHING(cudaGetLastError)
NOTHING(cudaPeekAtLastError)

// Memory and copies
ENTRY cudaMalloc(void **out, size_t bytes) { return allocate(out, bytes, cudaMemoryTypeDevice); }
ENTRY cudaMallocAsync(void **out, size_t bytes, cudaStream_t) { return allocate(out, bytes, cudaMemoryTypeDevice); }
ENTRY cudaHostAlloc(void **out, size_t bytes, unsigned) { return allocate(out, bytes, cudaMemoryTypeHost); }
ENTRY cudaFree(void *pointer) { return release(pointer); }
ENTRY cudaFreeAsync(void *pointer, cudaStream_t) { return release(pointer); }
ENTRY cudaFreeHost(void *pointer) { return release(pointer); }
NOTHING(cudaHostRegister, void *, size_t, unsigned)
NOTHING(cudaHostUnregister, void *)
ENTRY cudaPointerGetAttributes(cudaPointerAttributes *out, const void *pointer) {
    LOCK;
    memset(out, 0, sizeof *out);
    const Block *block = find(pointer);
    out->type = block ? block->type : cudaMemoryTypeUnregistered;
    out->device = block ? block->device : -2;
    if (block) out->devicePointer = out->hostPointer = (void *)pointer;
    return cudaSuccess;
}
ENTRY cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    LOCK;
    of(stream)->add([=] { memmove(to, from, bytes); });
    if (!find(to) || !find(from)) of(stream)->run();  // memory that is not pinned is copied while the host waits
    return cudaSuccess;
}
ENTRY cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
ENTRY cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    LOCK;
    cudaMemcpyAsync(to, from, bytes, kind, nullptr);
    return default_stream.run(), cudaSuccess;
}
ENTRY cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                        cudaMemcpyKind, cudaStream_t stream) {
    LOCK;
    of(stream)->add([=] {
        for (size_t row = 0; row < height; ++row)
            memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    });
    return cudaSuccess;
}
ENTRY cudaMemset(void *to, int value, size_t bytes) {
    LOCK;
    default_stream.run();
    return memset(to, value, bytes), cudaSuccess;
}
ENTRY cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    LOCK;
    return of(stream)->add([=] { memset(to, value, bytes); }), cudaSuccess;
}
ENTRY cudaGetSymbolAddress(void **out, const void *) { return allocate(out, 1 << 16, cudaMemoryTypeDevice); }
NOTHING(cudaMemcpyToSymbol, const void *, const void *, size_t, size_t, cudaMemcpyKind)
ENTRY cudaDeviceGetDefaultMemPool(cudaMemPool_t *out, int) { return handle(out); }
NOTHING(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void *)
ENTRY cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *out) { return memset(out, 0, 8), cudaSuccess; }

// Streams, events and graphs
ENTRY cudaStreamCreateWithPriority(cudaStream_t *out, unsigned, int) {
    LOCK;
    auto *stream = new Stream;
    streams[stream] = current_device;
    return *out = (cudaStream_t)stream, cudaSuccess;
}
ENTRY cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, 0, 0); }
ENTRY cudaStreamSynchronize(cudaStream_t stream) {
    LOCK;
    return of(stream)->run(), cudaSuccess;
}
ENTRY cudaStreamDestroy(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
ENTRY cudaStreamQuery(cudaStream_t stream) {
    LOCK;
    return of(stream)->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}
ENTRY cudaStreamGetPriority(cudaStream_t, int *out) { return *out = 0, cudaSuccess; }
ENTRY cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    LOCK;
    const Event awaited = *(Event *)event;
    if (awaited.stream) of(stream)->add([=] { awaited.stream->run_until(awaited.at); });
    return cudaSuccess;
}
ENTRY cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    LOCK;
    return of(stream)->add([=] { function(data); }), cudaSuccess;
}
ENTRY cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) { return *out = (cudaEvent_t) new Event, cudaSuccess; }
ENTRY cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
NOTHING(cudaEventDestroy, cudaEvent_t)
ENTRY cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    LOCK;
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    of(stream)->add(nullptr);
    *(Event *)event = {of(stream), of(stream)->put, std::chrono::duration<double, std::milli>(now).count()};
    return cudaSuccess;
}
ENTRY cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
ENTRY cudaEventQuery(cudaEvent_t event) {
    LOCK;
    const Event *asked = (Event *)event;
    return !asked->stream || asked->stream->begun >= asked->at ? cudaSuccess : cudaErrorNotReady;
}
ENTRY cudaEventSynchronize(cudaEvent_t event) {
    LOCK;
    const Event *awaited = (Event *)event;
    if (awaited->stream) awaited->stream->run_until(awaited->at);
    return cudaSuccess;
}
ENTRY cudaEventElapsedTime(float *out, cudaEvent_t begin, cudaEvent_t end) {
    return *out = ((Event *)end)->when - ((Event *)begin)->when + 1e-3, cudaSuccess;
}
ENTRY cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    return captured = stream, capturing = true, cudaSuccess;
}
ENTRY cudaStreamEndCapture(cudaStream_t, cudaGraph_t *out) { return capturing = false, handle(out); }
ENTRY cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *out) {
    return capture_status(stream, out), cudaSuccess;
}
ENTRY cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *out, unsigned long long *number, cudaGraph_t *,
                               const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *) {
    if (number) *number = 1;
    return capture_status(stream, out), cudaSuccess;
}
NOTHING(cudaThreadExchangeStreamCaptureMode, cudaStreamCaptureMode *)
ENTRY cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t, unsigned long long) { return handle(out); }
ENTRY cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t *, size_t *out) { return *out = 0, cudaSuccess; }
NOTHING(cudaGraphDestroy, cudaGraph_t)
NOTHING(cudaGraphExecDestroy, cudaGraphExec_t)

// Kernels: known, started, and nothing else
ENTRY cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) { return started(stream); }
ENTRY cudaLaunchCooperativeKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) { return started(stream); }
ENTRY cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *, void **) { return started(config->stream); }
ENTRY __cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) { return started(stream); }
ENTRY __cudaGetKernel(void **out, const void *function) { return *out = (void *)function, cudaSuccess; }
ENTRY cudaFuncGetAttributes(cudaFuncAttributes *out, const void *) {
    memset(out, 0, sizeof *out);
    return out->maxThreadsPerBlock = 1024, out->numRegs = 32, out->binaryVersion = out->ptxVersion = 90, cudaSuccess;
}
NOTHING(cudaFuncSetAttribute, const void *, cudaFuncAttribute, int)
ENTRY cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *out, const void *, int, size_t) { return *out = 2, cudaSuccess; }
ENTRY cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *, int, size_t, unsigned) {
    return *out = 2, cudaSuccess;
}
namespace {
thread_local struct { dim3 grid, block; size_t shared; void *stream; } pushed;
}
extern "C" unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    return pushed = {grid, block, shared, stream}, 0;
}
ENTRY __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
    return cudaSuccess;
}
extern "C" void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
extern "C" void __cudaRegisterFatBinaryEnd(void **) {}
extern "C" void __cudaUnregisterFatBinary(void **) {}
extern "C" void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *) {}
extern "C" void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
extern "C" char __cudaInitModule(void **) { return 1; }
ENTRY cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned, unsigned long long,
                                       cudaDriverEntryPointQueryResult *status) {
    static void *const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *out = driver ? dlsym(driver, name) : nullptr;
    if (status) *status = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
