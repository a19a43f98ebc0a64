// Python's arrays by address, shape and strides, and how they lie in memory. Part of module.cpp.

enum class DType { none, f16, bf16, f32, f64, boolean };

// An array of Python. Strides count values.
struct Array {
    char *data = nullptr;
    DType dtype = DType::none;
    int ndim = 0;
    long shape[NDIM], stride[NDIM];

    long size() const { return std::accumulate(shape, shape + ndim, 1L, std::multiplies<long>()); }
    double operator[](long i) const {  // only of a vector
        const long at = i * stride[0];
        switch (dtype) {
            case DType::f16: return value(((const float16 *)data)[at]);
            case DType::bf16: return value(((const bfloat16 *)data)[at]);
            case DType::f32: return ((const float *)data)[at];
            default: return ((const double *)data)[at];
        }
    }
};

// Calls operation with a value of the C++ type of a dtype. Returns false for none and boolean.
template <class F>
bool by_dtype(DType dtype, F operation) {
    switch (dtype) {
        case DType::f16: return operation(float16{});
        case DType::bf16: return operation(bfloat16{});
        case DType::f32: return operation(float{});
        case DType::f64: return operation(double{});
        default: return false;
    }
}

// The largest number of a dtype.
double largest(DType dtype) {
    return dtype == DType::f16    ? 65504.0
           : dtype == DType::bf16 ? 0x1.fep127
           : dtype == DType::f32  ? 0x1.fffffep127
                                  : 0x1.fffffffffffffp1023;
}

// Stores a number, rounded to the dtype. Half precision is rounded by way of float32, as in torch.
void put(double &to, double v) { to = v; }
void put(float &to, double v) { to = (float)v; }
void put(bfloat16 &to, double v) { baseline::store_part(&to, baseline::vec<bfloat16>{(float)v}, 1); }
void put(float16 &to, double v) { baseline::store_part(&to, baseline::vec<float16>{(float)v}, 1); }

bool locate_by_dlpack(const dlpack::ExchangeAPI &api, nb::handle object, Array &array) {
    dlpack::Tensor tensor;
    if (!dlpack::read(api, object.ptr(), tensor)) return false;
    array.dtype = tensor.code == 4 && tensor.bits == 16   ? DType::bf16
                  : tensor.code == 6 && tensor.bits == 8  ? DType::boolean
                  : tensor.code != 2 || tensor.lanes != 1 ? DType::none
                  : tensor.bits == 16                     ? DType::f16
                  : tensor.bits == 32                     ? DType::f32
                  : tensor.bits == 64                     ? DType::f64
                                                          : DType::none;
    if (tensor.dimensions > NDIM) return false;
    array.data = tensor.begin();
    array.ndim = tensor.dimensions;
    std::copy_n(tensor.shape, tensor.dimensions, array.shape);
    std::copy_n(tensor.strides, tensor.dimensions, array.stride);
    return tensor.device_type == 1 && array.dtype != DType::none && (array.data || array.size() == 0);
}

bool locate_by_attributes(nb::handle torch, nb::handle object, Array &array) {
    static PyObject *const names[] = {
        PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("shape"),
        PyUnicode_InternFromString("stride"), PyUnicode_InternFromString("data_ptr"),
        PyUnicode_InternFromString("is_cpu")};
    static PyObject *const dtypes[] = {torch.attr("float16").ptr(), torch.attr("bfloat16").ptr(),
                                       torch.attr("float32").ptr(), torch.attr("float64").ptr(),
                                       torch.attr("bool").ptr()};
    const nb::object dtype = object.attr(names[0]);
    const auto known = std::find(dtypes, dtypes + 5, dtype.ptr());
    if (known == dtypes + 5 || object.attr(names[4]).ptr() != Py_True) return false;
    array.dtype = (DType)(known - dtypes + 1);
    const nb::object shape = object.attr(names[1]),
                     stride = nb::steal(PyObject_CallMethodObjArgs(object.ptr(), names[2], nullptr)),
                     address = nb::steal(PyObject_CallMethodObjArgs(object.ptr(), names[3], nullptr));
    if (!stride.is_valid() || !address.is_valid()) {
        PyErr_Clear();
        return false;
    }
    if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr()) || PyTuple_Size(shape.ptr()) > NDIM)
        return false;
    array.ndim = (int)PyTuple_Size(shape.ptr());
    for (int d = 0; d < array.ndim; ++d) {
        array.shape[d] = PyLong_AsLong(PyTuple_GetItem(shape.ptr(), d));
        array.stride[d] = PyLong_AsLong(PyTuple_GetItem(stride.ptr(), d));
    }
    array.data = (char *)PyLong_AsVoidPtr(address.ptr());
    if (PyErr_Occurred()) throw nb::python_error();
    return array.data || array.size() == 0;
}

// Fills `array`; None becomes an array without data. Returns false unless the object is a NumPy
// array or a torch tensor in host memory, of a dtype that the loops know, or boolean.
bool locate_any(nb::handle object, Array &array, bool to_write = false) {
    if (object.is_none()) return true;
    if (PyObject_CheckBuffer(object.ptr())) {  // NumPy
        Py_buffer view;
        if (PyObject_GetBuffer(object.ptr(), &view,
                               PyBUF_STRIDES | PyBUF_FORMAT | (to_write ? PyBUF_WRITABLE : 0)) != 0) {
            PyErr_Clear();
            return false;
        }
        const char *format = view.format;
        array.dtype = std::strlen(format) != 1 ? DType::none
                      : *format == 'e'         ? DType::f16
                      : *format == 'f'         ? DType::f32
                      : *format == 'd'         ? DType::f64
                      : *format == '?'         ? DType::boolean
                                               : DType::none;
        bool whole = array.dtype != DType::none && (uintptr_t)view.buf % view.itemsize == 0;
        array.data = (char *)view.buf;
        array.ndim = view.ndim;
        for (int d = 0; d < view.ndim; ++d) {
            array.shape[d] = view.shape[d];
            array.stride[d] = view.strides[d] / view.itemsize;
            whole = whole && view.strides[d] % view.itemsize == 0;
        }
        PyBuffer_Release(&view);  // the caller holds the array until we are done
        return whole;
    }
    // These are never released, because Python may be gone first at exit.
    static const nb::handle torch = nb::module_::import_("torch").release();
    static const auto *const api = dlpack::functions_of(nb::object(torch.attr("Tensor")).ptr());
    static PyObject *const plain = torch.attr("Tensor").ptr(), *const parameter =
                                                                   torch.attr("nn").attr("Parameter").ptr();
    static PyObject *const is_neg = PyUnicode_InternFromString("is_neg");
    const PyObject *const type = (PyObject *)Py_TYPE(object.ptr());
    const nb::object negated = nb::steal(PyObject_CallMethodObjArgs(object.ptr(), is_neg, nullptr));
    if (negated.ptr() != Py_False) {  // no tensor, or its neg bit is set: signs in memory are opposite
        PyErr_Clear();
        return false;
    }
    return api && (type == plain || type == parameter) ? locate_by_dlpack(*api, object, array)
                                                       : locate_by_attributes(torch, object, array);
}

// Fills `array` as locate_any does, but refuses a boolean one.
bool locate(nb::handle object, Array &array, bool to_write = false) {
    return locate_any(object, array, to_write) && array.dtype != DType::boolean;
}

// Fills `array` as locate_any does, but refuses one that is not boolean.
bool locate_mask(nb::handle object, Array &array) {
    return locate_any(object, array) && (object.is_none() || array.dtype == DType::boolean);
}

// How arrays of one shape lie in memory: all as planes, or all as rows.
struct Layout {
    bool rows;
    long samples, channels, positions;  // rows have one sample
    long outer[4], channel[4];          // strides of each array
};

// Fills `dims` with the dimensions, innermost first, except that of the channels and those of
// length 1. Returns how many they are.
int dims_from_innermost(const Array &x, int (&dims)[NDIM]) {
    int count = 0;
    for (int d = 0; d < x.ndim; ++d)
        if (d != 1 && x.shape[d] != 1) dims[count++] = d;
    // An expanded dimension has stride 0. It counts as outermost, because it only repeats values.
    auto far = [&](int d) { return x.stride[d] ? (unsigned long)x.stride[d] : ~0ul; };
    std::sort(dims, dims + count, [&](int a, int b) { return far(a) < far(b); });
    return count;
}

// Fills `layout` with that of arrays[0]. Returns false if the others lie in another way: then the
// caller has to copy them. Absent arrays have no data.
bool lay_out(const Array *const (&arrays)[4], Layout &layout) {
    const Array &x = *arrays[0];
    int dims[NDIM];
    const int count = dims_from_innermost(x, dims);
    auto all = [&](auto holds) {
        for (int i = 0; i < 4; ++i)
            if (arrays[i]->data && !holds(*arrays[i], i)) return false;
        return true;
    };
    // Merges dimensions from the given one on, as long as they follow each other without a gap in
    // every array. Returns the merged length.
    auto merge = [&](int &from, long (&stride)[4]) {
        long length = 1;
        if (from < count)
            all([&](const Array &array, int i) {
                stride[i] = array.stride[dims[from]];
                return true;
            });
        for (; from < count; ++from) {
            if (!all([&](const Array &array, int i) {
                    return array.stride[dims[from]] == stride[i] * length;
                }))
                break;
            length *= x.shape[dims[from]];
        }
        return length;
    };

    layout.channels = x.shape[1];
    layout.samples = 1;
    int from = 0;
    layout.rows = x.shape[1] > 1 && all([](const Array &array, int) { return array.stride[1] == 1; });
    for (int i = 0; i < 4; ++i) {
        layout.outer[i] = layout.channels;
        layout.channel[i] = arrays[i]->data && x.shape[1] > 1 ? arrays[i]->stride[1] : layout.rows;
    }
    if (layout.rows) {
        layout.positions = merge(from, layout.outer);
    } else {
        long inner[4] = {1, 1, 1, 1};
        layout.positions = merge(from, inner);
        if (!all([&](const Array &, int i) { return inner[i] == 1; })) return false;
        layout.samples = merge(from, layout.outer);
    }
    return from == count;
}
