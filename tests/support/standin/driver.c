/* What Triton, and torch beside its runtime, ask of CUDA's driver: see runtime.cpp. Nothing is loaded, nothing started. */
#include <cuda.h>
#include <string.h>

#define ENTRY __attribute__((visibility("default"))) CUresult
#define NOTHING(name, ...) ENTRY name(__VA_ARGS__) { return CUDA_SUCCESS; }

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
ENTRY cuGetErrorString(CUresult error, const char **out) { return *out = "of a stand-in", CUDA_SUCCESS; }
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
NOTHING(cuLaunchKernelEx, const CUlaunchConfig *config, CUfunction function, void **arguments, void **more)
NOTHING(cuLaunchKernel, CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
        unsigned shared, CUstream stream, void **arguments, void **more)
