// The C functions that torch 2.10 and newer have for DLPack, which describe a tensor without a call of
// Python. A call of a tensor's method takes ten times as long.
#pragma once

#include <Python.h>

#include <cstdint>

namespace dlpack {

// As in DLPack's own dlpack.h, version 1
struct Tensor {
    char *data;
    int32_t device_type, device, dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;

    char *begin() const { return data + byte_offset; }
};
struct ExchangeAPI {
    uint32_t major, minor;
    const ExchangeAPI *previous;
    void *managed[3];
    int (*dltensor_from_py_object)(void *, Tensor *);
    void *current_work_stream;
};

// The functions for a class of tensors; null if it has none.
inline const ExchangeAPI *functions_of(PyObject *type) {
    PyObject *const capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    const auto *found = capsule ? (const ExchangeAPI *)PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
    Py_XDECREF(capsule);
    PyErr_Clear();
    while (found && found->major > 1) found = found->previous;
    return found && found->major == 1 && found->dltensor_from_py_object ? found : nullptr;
}

// Returns false for an object without memory of its own, such as a sparse tensor.
inline bool read(const ExchangeAPI &api, PyObject *object, Tensor &out) {
    if (api.dltensor_from_py_object(object, &out) == 0) return true;
    PyErr_Clear();
    return false;
}

}  // namespace dlpack
