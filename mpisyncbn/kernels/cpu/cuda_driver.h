// The functions of CUDA's driver that the stream transport calls, looked up at run time.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

struct Driver {
    using Stream = void *;
    using Pointer = uint64_t;  // of a device
    using Error = int;         // 0: none

    union MemoryOperation {  // one of cuStreamBatchMemOp
        struct {
            uint32_t operation, padding;
            Pointer address;
            uint64_t value;
            uint32_t flags;
        } parts;
        uint64_t all[6];
    };

    void *library;
    Error (*cuMemHostAlloc)(void **, size_t, unsigned);
    Error (*cuMemcpyAsync)(Pointer, Pointer, size_t, Stream);
    Error (*cuStreamBatchMemOp_v2)(Stream, unsigned, MemoryOperation *, unsigned);
    Error (*cuStreamSynchronize)(Stream);
    Error (*cuEventCreate)(void **, unsigned);
    Error (*cuEventRecord)(void *, Stream);
    Error (*cuStreamWaitEvent)(Stream, void *, unsigned);
    Error (*cuStreamGetCaptureInfo_v2)(Stream, int *, uint64_t *, void **, const void ***, size_t *);
    Error (*cuThreadExchangeStreamCaptureMode)(int *);
    Error (*cuUserObjectCreate)(void **, void *, void (*)(void *), unsigned, unsigned);
    Error (*cuGraphRetainUserObject)(void *, void *, unsigned, unsigned);
    Error (*cuLaunchKernel)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream,
                            void **, void **);
    Error (*cuCtxGetCurrent)(void **);
    Error (*cuCtxGetDevice)(int *);
    Error (*cuCtxSetCurrent)(void *);
    Error (*cuCtxSynchronize)();
    Error (*cuDevicePrimaryCtxRetain)(void **, int);
    Error (*cuEventSynchronize)(void *);
    Error (*cuInit)(unsigned);
    Error (*cuDeviceGet)(int *, int);
    Error (*cuDeviceGetAttribute)(int *, int, int);
    Error (*cuGetErrorString)(Error, const char **);

    // Throws std::runtime_error if the library or one of the functions is missing.
    explicit Driver(const std::string &path) {
        library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
        if (!library) throw std::runtime_error(dlerror());
        const auto find = [&](auto &function, const char *name) {
            if (!(function = (std::decay_t<decltype(function)>)dlsym(library, name)))
                throw std::runtime_error(path + " has no " + name);
        };
#define FIND(name) find(name, #name)
        FIND(cuMemHostAlloc), FIND(cuMemcpyAsync), FIND(cuStreamBatchMemOp_v2), FIND(cuStreamSynchronize);
        FIND(cuEventCreate), FIND(cuEventRecord), FIND(cuStreamWaitEvent), FIND(cuStreamGetCaptureInfo_v2);
        FIND(cuThreadExchangeStreamCaptureMode), FIND(cuUserObjectCreate), FIND(cuGraphRetainUserObject);
        FIND(cuInit), FIND(cuCtxGetCurrent), FIND(cuCtxSetCurrent), FIND(cuCtxSynchronize), FIND(cuLaunchKernel);
        FIND(cuCtxGetDevice), FIND(cuDevicePrimaryCtxRetain), FIND(cuEventSynchronize);
        FIND(cuDeviceGet), FIND(cuDeviceGetAttribute), FIND(cuGetErrorString);
#undef FIND
    }

    void check(Error error, const char *what) const {
        if (error == 0) return;
        const char *words = nullptr;
        cuGetErrorString(error, &words);
        throw std::runtime_error(std::string(what) + ": " + (words ? words : std::to_string(error)));
    }

    // The primary context of the device with this number, which torch and CuPy use.
    void *primary_context(int number) const {
        int device = 0;
        void *context = nullptr;
        check(cuDeviceGet(&device, number), "cuDeviceGet");
        check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
        return context;
    }

    // Whether the device with this number has stream memory operations.
    bool has_memory_operations(int number) const {
        int device = 0, has = 0;
        if (cuInit(0) || cuDeviceGet(&device, number)) return false;
        for (const int attribute : {92, 122})  // CAN_USE_STREAM_MEM_OPS_V1, CAN_USE_64_BIT_STREAM_MEM_OPS
            if (cuDeviceGetAttribute(&has, attribute, device) == 0 && has) return true;
        return false;
    }
};

// Makes a context the current one of this thread. The end of its life brings back the one before.
class InContext {
    const Driver &driver;
    void *before = nullptr;
    const bool differs;

   public:
    InContext(const Driver &driver, void *context)
        : driver(driver), differs(driver.cuCtxGetCurrent(&before) || before != context) {
        if (differs) driver.check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent");
    }
    InContext(const InContext &) = delete;
    ~InContext() {
        if (differs) driver.cuCtxSetCurrent(before);
    }
};

// CUDA's numbers, and the stream that each thread has under one number
const Driver::Stream PER_THREAD = (void *)2;
enum { WAIT_VALUE_32 = 1, WRITE_VALUE_32 = 2, WAIT_EQUAL = 1 };
enum { HOST_PORTABLE = 1, HOST_MAPPED = 2, NO_TIMING = 2, CAPTURING = 1, RELAXED = 2, MOVE = 1, NO_SYNC = 1 };
