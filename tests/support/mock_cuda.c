/* A stand-in for the CUDA driver library, for tests on machines without a GPU.
 *
 * It has the entry points that Intel MPI 2021.18 looks up (it does not start if one of them is
 * absent) when the environment says
 *   I_MPI_OFFLOAD=1 I_MPI_OFFLOAD_MODE=cuda I_MPI_OFFLOAD_CUDA_LIBRARY=<this library>
 * and cuMemcpyHtoD and cuMemcpyDtoH, for fake_cupy.py, which also builds it.
 *
 * "Device" memory is a memfd mapped twice: at the device address, without any access rights, and
 * at an address that only this file knows, where it reads and writes.  Code that dereferences a
 * device pointer gets a segmentation fault, as with a GPU: a right result was moved by cuMemcpy,
 * and by nothing else.  Work is complete when it is submitted, so streams and events do nothing.
 * There is one device, and it runs no kernels.
 *
 * Each entry point NAME counts its calls in a variable, calls_NAME, which tests read. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uintptr_t ptr;                                          /* CUdeviceptr */
typedef struct { long pid, fd; size_t bytes; char pad[40]; } handle;    /* CUipcMemHandle */
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_SUPPORTED = 801 };     /* CUresult */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Defines an entry point, which counts its calls and runs one at a time.  Its body follows. */
#define ENTRY(name, parameters, arguments) \
    long calls_##name; \
    static int do_##name parameters; \
    int name parameters \
    { \
        pthread_mutex_lock(&lock); \
        calls_##name++; \
        int result = do_##name arguments; \
        pthread_mutex_unlock(&lock); \
        return result; \
    } \
    static int do_##name parameters

/* Defines an entry point that returns a constant, whatever its arguments. */
#define CONSTANT(name, result) ENTRY(name, (void), ()) { return result; }

/* ---- device memory ---- */

enum { RANGES = 1024 };
static struct range { ptr base; size_t bytes; char *backing; int fd; long id; } ranges[RANGES];

static struct range *find(ptr p)                /* the allocation that p points into, or NULL */
{
    for (struct range *r = ranges; r < ranges + RANGES; r++)
        if (p - r->base < r->bytes)
            return r;
    return NULL;
}

static int map(ptr *out, size_t bytes, int fd)
{
    static long last_id;                        /* unlike an address, never reused: MPI's */
    struct range *r = ranges;                   /* caches tell allocations apart by the id */
    while (r < ranges + RANGES && r->bytes)
        r++;
    void *device = mmap(NULL, bytes, PROT_NONE, MAP_SHARED, fd, 0);
    void *backing = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (device == MAP_FAILED || backing == MAP_FAILED || r == ranges + RANGES)
        return OUT_OF_MEMORY;                   /* nothing is unmapped: the test has failed */
    *out = (ptr)device;
    *r = (struct range){*out, bytes, backing, fd, ++last_id};
    return OK;
}

static int unmap(ptr p)
{
    struct range *r = find(p);
    if (!r || r->base != p)
        return INVALID_VALUE;
    munmap((void *)r->base, r->bytes);
    munmap(r->backing, r->bytes);
    close(r->fd);
    *r = (struct range){0};
    return OK;
}

static int copy(ptr to, ptr from, size_t bytes) /* what is not device memory is host memory */
{
    struct range *t = find(to), *f = find(from);
    if ((t && bytes > t->bytes - (to - t->base)) || (f && bytes > f->bytes - (from - f->base)))
        return INVALID_VALUE;                   /* out of bounds */
    memmove(t ? t->backing + (to - t->base) : (char *)to,
            f ? f->backing + (from - f->base) : (char *)from, bytes);
    return OK;
}

ENTRY(cuMemAlloc_v2, (ptr *out, size_t bytes), (out, bytes))
{
    int fd = memfd_create("mock_cuda", MFD_CLOEXEC);
    if (!bytes || fd < 0 || ftruncate(fd, (off_t)bytes))
        return bytes ? OUT_OF_MEMORY : INVALID_VALUE;
    return map(out, bytes, fd);
}
ENTRY(cuMemFree_v2, (ptr p), (p)) { return unmap(p); }
ENTRY(cuMemcpyHtoD_v2, (ptr to, ptr from, size_t n), (to, from, n)) { return copy(to, from, n); }
ENTRY(cuMemcpyDtoH_v2, (ptr to, ptr from, size_t n), (to, from, n)) { return copy(to, from, n); }
ENTRY(cuMemcpyAsync, (ptr to, ptr from, size_t n, void *stream), (to, from, n, stream))
{
    (void)stream;
    return copy(to, from, n);
}
ENTRY(cuMemGetAddressRange_v2, (ptr *base, size_t *bytes, ptr p), (base, bytes, p))
{
    struct range *r = find(p);
    if (base && r)
        *base = r->base;
    if (bytes && r)
        *bytes = r->bytes;
    return r ? OK : INVALID_VALUE;
}
ENTRY(cuPointerGetAttribute, (void *out, int attribute, ptr p), (out, attribute, p))
{
    struct range *r = find(p);
    if (r)
        switch (attribute) {
        case 2: *(unsigned *)out = 2; return OK;        /* MEMORY_TYPE: CU_MEMORYTYPE_DEVICE */
        case 7: *(long long *)out = r->id; return OK;   /* BUFFER_ID */
        case 8: *(unsigned *)out = 0; return OK;        /* IS_MANAGED */
        case 9: *(int *)out = 0; return OK;             /* DEVICE_ORDINAL */
        default: fprintf(stderr, "mock_cuda: pointer attribute %d?\n", attribute);
        }
    return INVALID_VALUE;                       /* the driver's answer for any other memory */
}

/* ---- the device memory of another process: the handle names the descriptor to open ---- */

ENTRY(cuIpcGetMemHandle, (handle *out, ptr p), (out, p))
{
    struct range *r = find(p);
    if (r)
        *out = (handle){getpid(), r->fd, r->bytes, {0}};
    return r ? OK : INVALID_VALUE;
}
ENTRY(cuIpcOpenMemHandle_v2, (ptr *out, handle h, unsigned flags), (out, h, flags))
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%ld/fd/%ld", h.pid, h.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    (void)flags;
    return fd < 0 ? INVALID_VALUE : map(out, h.bytes, fd);
}
ENTRY(cuIpcCloseMemHandle, (ptr p), (p)) { return unmap(p); }

/* ---- one device and one context; streams and events have nothing to wait for ---- */

#define HANDLE(name) ENTRY(name, (void **out), (out)) { *out = ranges; return OK; } /* not NULL */
#define NUMBER(name, n) ENTRY(name, (int *out), (out)) { *out = n; return OK; }
ENTRY(cuDevicePrimaryCtxGetState, (int dev, unsigned *flags, int *active), (dev, flags, active))
{
    *flags = 0;
    *active = 1;
    return dev ? INVALID_VALUE : OK;
}
NUMBER(cuDeviceGetCount, 1) NUMBER(cuDeviceGet, 0) NUMBER(cuDeviceGetAttribute, 0)
HANDLE(cuDevicePrimaryCtxRetain) HANDLE(cuStreamCreate) HANDLE(cuEventCreate)
CONSTANT(cuInit, OK) CONSTANT(cuCtxSetCurrent, OK) CONSTANT(cuDevicePrimaryCtxRelease_v2, OK)
CONSTANT(cuStreamDestroy_v2, OK) CONSTANT(cuStreamWaitEvent, OK) CONSTANT(cuEventDestroy_v2, OK)
CONSTANT(cuEventRecord, OK) CONSTANT(cuEventQuery, OK) CONSTANT(cuEventSynchronize, OK)
CONSTANT(cuMemHostRegister_v2, OK) CONSTANT(cuMemHostUnregister, OK)

/* ---- looked up by Intel MPI, and not called so far ---- */

CONSTANT(cuCtxCreate_v2, NOT_SUPPORTED) CONSTANT(cuDeviceGetName, NOT_SUPPORTED)
CONSTANT(cuMemAllocManaged, NOT_SUPPORTED) CONSTANT(cuMemsetD8_v2, NOT_SUPPORTED)
CONSTANT(cuModuleLoadFatBinary, NOT_SUPPORTED) CONSTANT(cuModuleUnload, NOT_SUPPORTED)
CONSTANT(cuModuleGetFunction, NOT_SUPPORTED) CONSTANT(cuModuleGetGlobal_v2, NOT_SUPPORTED)
CONSTANT(cuOccupancyMaxPotentialBlockSize, NOT_SUPPORTED) CONSTANT(cuLaunchKernel, NOT_SUPPORTED)
