// The update of running statistics, and other work on vectors of channels. Part of module.cpp.

// Moves the running statistics towards those of a batch, in place, and adds one to the tensor
// num_batches_tracked, if it is not None. Returns false, and changes nothing, if a value is not
// finite in their dtype, or if it cannot read the arrays. All is in one call, because Python's
// interrupts come between calls. `record_change`, if it is not None, tells autograd. The caller has
// refused tensors that only torch may change.
bool update_running_stats(nb::handle running_mean_object, nb::handle running_var_object,
                          nb::handle num_batches_tracked, nb::handle record_change, const Vector &mean,
                          const Vector &var, double to_unbiased, double momentum) {
    Array running[2];
    if (!locate(running_mean_object, running[0], true) || !locate(running_var_object, running[1], true))
        return false;
    const long channels = (long)mean.size();
    for (const Array &array : running)
        if (array.ndim != 1 || array.shape[0] != channels || array.stride[0] != 1 ||
            array.dtype != running[0].dtype)
            return false;
    const DType dtype = running[0].dtype;
    // NumPy rounds its float16 from float64; torch and put() round by way of float32.
    if (dtype == DType::f16 && PyObject_CheckBuffer(running_mean_object.ptr())) return false;
    const double *const means_in = mean.data(), *const vars_in = var.data(), limit = largest(dtype);
    bool fit = true;
    for (long c = 0; c < channels; ++c)
        fit &= std::fabs(means_in[c]) <= limit && vars_in[c] * to_unbiased <= limit;
    if (!fit) return false;
    // Calls that may raise come before anything is written.
    if (!num_batches_tracked.is_none()) num_batches_tracked.attr("add_")(1);
    if (!record_change.is_none()) record_change(nb::make_tuple(running_mean_object, running_var_object));
    const auto lerp =
        [&](double old, double batch) {  // from the nearer end, as torch does: momentum 1 gives batch
            return momentum < 0.5 ? old + momentum * (batch - old) : batch - (1 - momentum) * (batch - old);
        };
    return by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        T *__restrict means = (T *)running[0].data, *__restrict vars = (T *)running[1].data;
        for (long c = 0; c < channels; ++c) {
            put(means[c], lerp(value(means[c]), means_in[c]));
            put(vars[c], lerp(value(vars[c]), vars_in[c] * to_unbiased));
        }
        return true;
    });
}

// Fills `out` with 1 / sqrt(var + eps).
void invstd(const Vector &var, double eps,
            nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
    inverse_roots(var.size(), var.data(), eps, out.data());
}

// Whether the vectors fit x as they usually do: x has at least 2 dimensions and a channel, and all
// vectors have the length of its channels and one dtype, that of x or float32 for a half-precision
// x. If not, arguments.check_arguments finds out what is wrong, if anything is.
bool passes_fast_check(nb::handle x_object, nb::handle weight_object, nb::handle bias_object,
                       nb::handle running_mean_object, nb::handle running_var_object) {
    Array x;
    if (!locate(x_object, x) || x.ndim < 2 || x.shape[1] == 0) return false;
    if (running_mean_object.is_none() != running_var_object.is_none()) return false;
    const bool half = x.dtype == DType::f16 || x.dtype == DType::bf16;
    DType dtype = DType::none;  // that of the first vector
    for (const nb::handle object : {weight_object, bias_object, running_mean_object, running_var_object}) {
        Array vector;
        if (PyObject_CheckBuffer(object.ptr()) || !locate(object, vector)) return false;
        if (object.is_none()) continue;
        if (dtype == DType::none) dtype = vector.dtype;
        // A vector of length 0 has no data either, and is refused.
        if (vector.dtype != dtype || vector.ndim != 1 || vector.shape[0] != x.shape[1]) return false;
    }
    return dtype == DType::none || dtype == x.dtype || (half && dtype == DType::f32);
}
