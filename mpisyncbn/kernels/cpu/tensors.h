// Reads properties of torch's tensors, on any device, by DLPack. A method is called only for the
// property that DLPack does not have: whether values are negated when they are read.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>

#include "dlpack.h"

namespace tensors {

inline PyTypeObject *tensor_type = nullptr;
inline const dlpack::ExchangeAPI *api = nullptr;
inline PyObject *is_neg = nullptr;

// Takes torch.Tensor, the class of the tensors to read. Returns whether it has functions for DLPack.
inline bool use(PyObject *type) {
    const auto *const found = dlpack::functions_of(type);
    if (!found) return false;
    if (!is_neg) is_neg = PyUnicode_InternFromString("is_neg");
    Py_INCREF(type);  // never released, because its functions stay in use
    tensor_type = (PyTypeObject *)type, api = found;
    return true;
}

// Returns false unless it is a tensor with memory of its own, which sparse tensors, those of a transform
// and torch._efficientzerotensor do not have.
inline bool read(PyObject *object, dlpack::Tensor &out) {
    if (!api || !PyType_IsSubtype(Py_TYPE(object), tensor_type)) return false;
    if (!dlpack::read(*api, object, out)) return false;
    int64_t values = 1;
    for (int32_t i = 0; i < out.dimensions; ++i) values *= out.shape[i];
    return out.data || !values;
}

// The function that _cpu.pyi documents. Returns a new reference, or nullptr with Python's error.
inline PyObject *describe(PyObject *tuple) {
    std::string out;
    out.reserve(64 * PyTuple_Size(tuple));
    const auto put = [&out](const auto &value) { out.append((const char *)&value, sizeof value); };
    for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) {
        PyObject *const object = PyTuple_GetItem(tuple, i);
        dlpack::Tensor found;
        if (object == Py_None) {
            put(nullptr);
            continue;
        }
        if (!read(object, found)) Py_RETURN_NONE;
        PyObject *const negative = PyObject_CallMethodObjArgs(object, is_neg, nullptr);
        if (!negative) return nullptr;
        put(Py_TYPE(object)), put(found.device_type), put(found.device), put(found.dimensions);
        put(found.code), put(found.bits), put(found.lanes);
        put((uint8_t)((uint64_t)found.begin() % 16)), put((uint8_t)(negative == Py_True));
        out.append((const char *)found.shape, 8 * found.dimensions);
        out.append((const char *)found.strides, 8 * found.dimensions);
        Py_DECREF(negative);
    }
    return PyBytes_FromStringAndSize(out.data(), out.size());
}

// The address of a tensor, or one that is given as a number; 0 for None.
inline uint64_t address_of(PyObject *object) {
    if (object == Py_None) return 0;
    dlpack::Tensor found;
    if (read(object, found)) return (uint64_t)found.begin();
    PyObject *const number = PyLong_Check(object) ? (Py_INCREF(object), object)
                                                  : PyObject_CallMethod(object, "data_ptr", nullptr);
    if (!number) return 0;  // with Python's error
    const uint64_t address = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    return address;
}

}  // namespace tensors
