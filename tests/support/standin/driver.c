/* The functions of CUDA's driver that Triton, torch and the transport `stream` call. Streams, memory and graphs are the
   runtime's (streams.cpp): a CUstream is a cudaStream_t here too, and errors have the same numbers. No module is loaded. */
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#define ENTRY __attribute__((visibility("default"))) CUresult
#define NOTHING(name, ...) ENTRY name(__VA_ARGS__) { return CUDA_SUCCESS; }

cudaError_t standin_mailbox(void **out, size_t bytes);
cudaError_t standin_capture_info(cudaStream_t stream, enum cudaStreamCaptureStatus *out, unsigned long long *number,
                                 cudaGraph_t *graph);
cudaError_t standin_wait_value(cudaStream_t stream, const void *address, unsigned value, unsigned flags);
cudaError_t standin_write_value(cudaStream_t stream, void *address, unsigned value);

static int has_memory_operations(void)
{
    const char *without = getenv("MPISYNCBN_STANDIN_WITHOUT");
    return !without || strcmp(without, "stream_memory_operations");
}

ENTRY cuDriverGetVersion(int *out) { return *out = 13000, CUDA_SUCCESS; }
ENTRY cuDeviceGet(CUdevice *out, int number) { return *out = number, CUDA_SUCCESS; }
ENTRY cuDeviceGetCount(int *out) { return *out = 1, CUDA_SUCCESS; }
ENTRY cuDeviceGetAttribute(int *out, CUdevice_attribute attribute, CUdevice device)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *out = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *out = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *out = 65536; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *out = 9; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *out = 32; break;
    case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_MEM_OPS_V1:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS: *out = has_memory_operations(); break;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *out = 1; break;
    default: *out = 0;
    }
    return CUDA_SUCCESS;
}
ENTRY cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active)
{
    return *flags = 0, *active = device == 0, CUDA_SUCCESS;
}
ENTRY cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) { return *out = (CUcontext)64, CUDA_SUCCESS; }
ENTRY cuCtxGetCurrent(CUcontext *out) { return *out = (CUcontext)64, CUDA_SUCCESS; }
ENTRY cuCtxGetDevice(CUdevice *out) { return *out = 0, CUDA_SUCCESS; }
ENTRY cuGetErrorString(CUresult error, const char **out)
{
    switch (error) {
    case CUDA_SUCCESS: *out = "no error"; break;
    case CUDA_ERROR_INVALID_VALUE: *out = "invalid argument"; break;
    case CUDA_ERROR_NOT_READY: *out = "device not ready"; break;
    case CUDA_ERROR_NOT_SUPPORTED: *out = "operation not supported"; break;
    case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: *out = "operation not permitted when stream is capturing"; break;
    case CUDA_ERROR_STREAM_CAPTURE_ISOLATION: *out = "dependency created on uncaptured work in another stream"; break;
    case CUDA_ERROR_CAPTURED_EVENT: *out = "operation not permitted on an event last recorded in a capturing stream"; break;
    default: *out = "of a stand-in";
    }
    return CUDA_SUCCESS;
}
ENTRY cuModuleLoad(CUmodule *out, const char *path) { return *out = (CUmodule)128, CUDA_SUCCESS; }
ENTRY cuModuleLoadData(CUmodule *out, const void *image) { return *out = (CUmodule)128, CUDA_SUCCESS; }
ENTRY cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) { return *out = (CUfunction)256, CUDA_SUCCESS; }
ENTRY cuFuncGetAttribute(int *out, CUfunction_attribute attribute, CUfunction function)
{
    *out = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
    return CUDA_SUCCESS;
}
ENTRY cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr pointer)
{
    return memcpy(out, &pointer, sizeof pointer), CUDA_SUCCESS;
}
ENTRY cuCtxGetLimit(size_t *out, CUlimit limit) { return *out = 0, CUDA_SUCCESS; }
ENTRY cuOccupancyMaxActiveClusters(int *out, CUfunction function, const CUlaunchConfig *config) { return *out = 1, CUDA_SUCCESS; }
NOTHING(cuInit, unsigned flags)
NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
NOTHING(cuCtxSetCurrent, CUcontext context)
NOTHING(cuModuleUnload, CUmodule module)
NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)

/* Kernels are started, and do nothing. */
static void nothing(void *data) {}
ENTRY cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **more)
{
    return (CUresult)cudaLaunchHostFunc(config->hStream, nothing, NULL);
}
ENTRY cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                     unsigned shared, CUstream stream, void **arguments, void **more)
{
    return (CUresult)cudaLaunchHostFunc(stream, nothing, NULL);
}

/* Memory, streams, events */
#define FORWARD(name, call, ...) ENTRY name(__VA_ARGS__) { return (CUresult)call; }
FORWARD(cuMemAlloc_v2, cudaMalloc((void **)out, bytes), CUdeviceptr *out, size_t bytes)
FORWARD(cuMemFree_v2, cudaFree((void *)pointer), CUdeviceptr pointer)
FORWARD(cuMemHostAlloc, standin_mailbox(out, bytes), void **out, size_t bytes, unsigned flags)
FORWARD(cuMemFreeHost, cudaFreeHost(pointer), void *pointer)
ENTRY cuMemHostGetDevicePointer_v2(CUdeviceptr *out, void *pointer, unsigned flags)
{
    return *out = (CUdeviceptr)pointer, CUDA_SUCCESS;
}
FORWARD(cuMemcpyAsync, cudaMemcpyAsync((void *)to, (void *)from, bytes, cudaMemcpyDefault, stream), CUdeviceptr to,
        CUdeviceptr from, size_t bytes, CUstream stream)
FORWARD(cuMemcpyHtoDAsync_v2, cudaMemcpyAsync((void *)to, from, bytes, cudaMemcpyDefault, stream), CUdeviceptr to,
        const void *from, size_t bytes, CUstream stream)
FORWARD(cuMemcpyDtoHAsync_v2, cudaMemcpyAsync(to, (void *)from, bytes, cudaMemcpyDefault, stream), void *to,
        CUdeviceptr from, size_t bytes, CUstream stream)
FORWARD(cuCtxSynchronize, cudaDeviceSynchronize(), void)
FORWARD(cuStreamCreate, cudaStreamCreate(out), CUstream *out, unsigned flags)
FORWARD(cuStreamDestroy_v2, cudaStreamDestroy(stream), CUstream stream)
FORWARD(cuStreamSynchronize, cudaStreamSynchronize(stream), CUstream stream)
FORWARD(cuStreamQuery, cudaStreamQuery(stream), CUstream stream)
FORWARD(cuStreamWaitEvent, cudaStreamWaitEvent(stream, event, flags), CUstream stream, CUevent event, unsigned flags)
FORWARD(cuLaunchHostFunc, cudaLaunchHostFunc(stream, function, data), CUstream stream, CUhostFn function, void *data)
FORWARD(cuEventCreate, cudaEventCreate(out), CUevent *out, unsigned flags)
FORWARD(cuEventDestroy_v2, cudaEventDestroy(event), CUevent event)
FORWARD(cuEventRecord, cudaEventRecord(event, stream), CUevent event, CUstream stream)
FORWARD(cuEventQuery, cudaEventQuery(event), CUevent event)
FORWARD(cuEventSynchronize, cudaEventSynchronize(event), CUevent event)

/* Stream memory operations */
ENTRY cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags)
{
    if (!has_memory_operations()) return CUDA_ERROR_NOT_SUPPORTED;
    return (CUresult)standin_wait_value(stream, (void *)address, value, flags);
}
ENTRY cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags)
{
    if (!has_memory_operations()) return CUDA_ERROR_NOT_SUPPORTED;
    return (CUresult)standin_write_value(stream, (void *)address, value);
}
ENTRY cuStreamBatchMemOp_v2(CUstream stream, unsigned count, CUstreamBatchMemOpParams *operations, unsigned flags)
{
    CUresult error = has_memory_operations() ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
    for (unsigned i = 0; i < count && !error; ++i) {
        const CUstreamBatchMemOpParams *each = operations + i;
        switch (each->operation) {
        case CU_STREAM_MEM_OP_WAIT_VALUE_32:
            error = cuStreamWaitValue32_v2(stream, each->waitValue.address, each->waitValue.value, each->waitValue.flags);
            break;
        case CU_STREAM_MEM_OP_WRITE_VALUE_32:
            error = cuStreamWriteValue32_v2(stream, each->writeValue.address, each->writeValue.value, 0);
            break;
        case CU_STREAM_MEM_OP_BARRIER: break; /* all is in order here */
        default: error = CUDA_ERROR_NOT_SUPPORTED;
        }
    }
    return error;
}

/* Captures and graphs. Graphs have no nodes with handles here, so no dependencies are reported. */
FORWARD(cuStreamBeginCapture_v2, cudaStreamBeginCapture(stream, (enum cudaStreamCaptureMode)mode), CUstream stream,
        CUstreamCaptureMode mode)
FORWARD(cuStreamEndCapture, cudaStreamEndCapture(stream, out), CUstream stream, CUgraph *out)
FORWARD(cuStreamIsCapturing, cudaStreamIsCapturing(stream, (enum cudaStreamCaptureStatus *)out), CUstream stream,
        CUstreamCaptureStatus *out)
ENTRY cuStreamGetCaptureInfo_v3(CUstream stream, CUstreamCaptureStatus *out, cuuint64_t *number, CUgraph *graph,
                                const CUgraphNode **nodes, const CUgraphEdgeData **edges, size_t *count)
{
    unsigned long long found = 0;
    const cudaError_t error =
        standin_capture_info(stream, (enum cudaStreamCaptureStatus *)out, &found, graph);
    if (number) *number = found;
    if (count) *count = 0;
    return (CUresult)error;
}
ENTRY cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus *out, cuuint64_t *number, CUgraph *graph,
                                const CUgraphNode **nodes, size_t *count)
{
    return cuStreamGetCaptureInfo_v3(stream, out, number, graph, nodes, NULL, count);
}
FORWARD(cuThreadExchangeStreamCaptureMode, cudaThreadExchangeStreamCaptureMode((enum cudaStreamCaptureMode *)mode),
        CUstreamCaptureMode *mode)
FORWARD(cuGraphInstantiateWithFlags, cudaGraphInstantiateWithFlags(out, graph, flags), CUgraphExec *out, CUgraph graph,
        unsigned long long flags)
FORWARD(cuGraphLaunch, cudaGraphLaunch(executable, stream), CUgraphExec executable, CUstream stream)
FORWARD(cuGraphDestroy, cudaGraphDestroy(graph), CUgraph graph)
FORWARD(cuGraphExecDestroy, cudaGraphExecDestroy(executable), CUgraphExec executable)
FORWARD(cuUserObjectCreate, cudaUserObjectCreate(out, data, destroy, references, flags), CUuserObject *out, void *data,
        CUhostFn destroy, unsigned references, unsigned flags)
FORWARD(cuUserObjectRelease, cudaUserObjectRelease(object, count), CUuserObject object, unsigned count)
FORWARD(cuGraphRetainUserObject, cudaGraphRetainUserObject(graph, object, count, flags), CUgraph graph,
        CUuserObject object, unsigned count, unsigned flags)
