// A stand-in for CUDA's runtime, preloaded before libcudart: the memory of its device is that of the host, copies happen
// as late as they may, and kernels do nothing. With it, a torch that is built for CUDA runs its code for CUDA on a machine
// without a GPU: see scripts/standin. This file has devices, memory and kernels; streams.cpp has streams and graphs.
#include <algorithm>

#include "device.h"

using namespace standin;

namespace {

cudaError_t release(void *pointer) {
    {
        const Lock lock(mutex);
        if (const cudaError_t error = refused()) return error;
    }
    wait_for_all();  // as cudaFree waits
    const Lock lock(mutex);
    blocks.erase((char *)pointer);
    free(pointer);
    return cudaSuccess;
}

cudaError_t allowed(void **out, size_t bytes, cudaMemoryType type, bool mailbox = false) {
    {
        const Lock lock(mutex);
        if (const cudaError_t error = refused()) return error;
    }
    return allocate(out, bytes, type, mailbox);
}

cudaError_t started(cudaStream_t stream) {
    Lock lock(mutex);
    return of(stream)->add(lock, nullptr);
}

int device_count() {
    return (int)number("MPISYNCBN_STANDIN_DEVICES", 1);
}

}  // namespace

// Devices: the properties of an H200 that torch and Triton ask for
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
    {
        const Lock lock(mutex);
        if (const cudaError_t error = refused()) return error;
    }
    return wait_for_all(), cudaSuccess;
}
ENTRY cudaMemGetInfo(size_t *free, size_t *total) { return *free = 7ull << 30, *total = 8ull << 30, cudaSuccess; }
NOTHING(cudaDeviceEnablePeerAccess, int, unsigned)
NOTHING(cudaGetLastError)
NOTHING(cudaPeekAtLastError)

// Memory and copies
ENTRY cudaMalloc(void **out, size_t bytes) { return allowed(out, bytes, cudaMemoryTypeDevice); }
ENTRY cudaMallocAsync(void **out, size_t bytes, cudaStream_t) { return allocate(out, bytes, cudaMemoryTypeDevice); }
ENTRY cudaHostAlloc(void **out, size_t bytes, unsigned) { return allowed(out, bytes, cudaMemoryTypeHost); }
ENTRY standin_mailbox(void **out, size_t bytes) { return allowed(out, bytes, cudaMemoryTypeHost, true); }
ENTRY standin_mailboxes(size_t *out) {
    const Lock lock(mutex);
    *out = std::count_if(blocks.begin(), blocks.end(), [](const auto &each) { return each.second.mailbox; });
    return cudaSuccess;
}
ENTRY cudaFree(void *pointer) { return release(pointer); }
ENTRY cudaFreeAsync(void *pointer, cudaStream_t) { return release(pointer); }
ENTRY cudaFreeHost(void *pointer) { return release(pointer); }
NOTHING(cudaHostRegister, void *, size_t, unsigned)
NOTHING(cudaHostUnregister, void *)
ENTRY cudaPointerGetAttributes(cudaPointerAttributes *out, const void *pointer) {
    const Lock lock(mutex);
    memset(out, 0, sizeof *out);
    const Block *block = find(pointer);
    out->type = block ? block->type : cudaMemoryTypeUnregistered;
    out->device = block ? block->device : -2;
    if (block) out->devicePointer = out->hostPointer = (void *)pointer;
    return cudaSuccess;
}
ENTRY cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return copy_late(to, from, bytes, stream);
}
ENTRY cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream) {
    return copy_late(to, from, bytes, stream);
}
ENTRY cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    const cudaError_t error = copy_late(to, from, bytes, nullptr);
    return error ? error : cudaStreamSynchronize(nullptr);
}
ENTRY cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                        cudaMemcpyKind, cudaStream_t stream) {
    Lock lock(mutex);
    return of(stream)->add(lock, [=] {
        for (size_t row = 0; row < height; ++row)
            memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    });
}
ENTRY cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    Lock lock(mutex);
    return of(stream)->add(lock, [=] { memset(to, value, bytes); });
}
ENTRY cudaMemset(void *to, int value, size_t bytes) {
    const cudaError_t error = cudaMemsetAsync(to, value, bytes, nullptr);
    return error ? error : cudaStreamSynchronize(nullptr);
}
ENTRY cudaGetSymbolAddress(void **out, const void *) { return allocate(out, 1 << 16, cudaMemoryTypeDevice); }
NOTHING(cudaMemcpyToSymbol, const void *, const void *, size_t, size_t, cudaMemcpyKind)
ENTRY cudaDeviceGetDefaultMemPool(cudaMemPool_t *out, int) { return *out = (cudaMemPool_t) new char, cudaSuccess; }
NOTHING(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void *)
ENTRY cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *out) { return memset(out, 0, 8), cudaSuccess; }

// Kernels: they are found and launched, and compute nothing
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
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    return pushed = {grid, block, shared, stream}, 0;
}
ENTRY __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
    return cudaSuccess;
}
EXPORT void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **) {}
EXPORT void __cudaUnregisterFatBinary(void **) {}
EXPORT void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *) {}
EXPORT void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
EXPORT char __cudaInitModule(void **) { return 1; }
ENTRY cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned, unsigned long long,
                                       cudaDriverEntryPointQueryResult *status) {
    static void *const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *out = driver ? dlsym(driver, name) : nullptr;
    if (status) *status = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
