// No fused multiply-adds in here: they round differently from NumPy. (Only some processors have them without asking.)
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__FMA__) || defined(__aarch64__)
#pragma GCC optimize("fp-contract=off")
#endif

// Four divisions and roots at a time, where the processor can; AVX and no more, for the same reason.
#if defined(__x86_64__)
#define WITH_AVX __attribute__((target_clones("avx", "default")))
#else
#define WITH_AVX
#endif

// What exchange.py calls _LOST and _HIDDEN.
constexpr double LOST = 1e-8, HIDDEN = 0x1p-18;

// Returns whether some variance has lost digits.
WITH_AVX bool mean_and_var(size_t channels, double count, const double *__restrict sums, const double *__restrict squares,
                           double *__restrict mean, double *__restrict var) {
    int64_t lost = 0;
    for (size_t c = 0; c < channels; ++c) {
        const double center = sums[c] / count, square = center * center, rest = squares[c] / count - square;
        mean[c] = center;
        var[c] = rest;
        lost |= rest < LOST * square ? 1 : 0;
    }
    return lost;
}

// Packs a rank's moments. Returns whether some M2 will not show in the sums. One array after the other:
// stores to addresses 4096 bytes apart from what is loaded hold the loads up.
WITH_AVX bool pack(size_t channels, double count, const double *__restrict mean, const double *__restrict m2,
                   double *__restrict first, double *__restrict second) {
    for (size_t c = 0; c < channels; ++c) first[c] = mean[c] * count;
    int64_t hides = 0;
    for (size_t c = 0; c < channels; ++c) {
        const double sum = mean[c] * first[c] + m2[c];
        second[c] = sum;
        hides |= (m2[c] < LOST * sum ? 1 : 0) & (m2[c] != 0 ? 1 : 0);
    }
    return hides;
}

WITH_AVX void inverse_roots(size_t channels, const double *__restrict var, double eps, double *__restrict out) {
    for (size_t c = 0; c < channels; ++c) out[c] = 1 / std::sqrt(var[c] + eps);
}

// One exchange in one call: pack, MPI_Allreduce, check, merge. What exchange.py does with NumPy and mpi4py, in the same
// order and with the same roundings, without their calls.
//
// MPI's function and its handles come from mpi4py as numbers, so that one build serves every MPI library. A handle
// is an int in some of them (MPICH and its kin), a pointer in others (Open MPI).
//
// One thread at a time: exchange.py holds the communicator's lock.
struct Link {
    uintptr_t function, comm, datatype, op, in_place;
    bool int_handles;
    int size;
    std::vector<double> message;
    bool lost, hidden;  // of the last sum_moments: whether digits were, whether some rank said that it hides more

    enum { MISMATCH = -1, FAILED = -2 };  // what a call returns instead of a count; FAILED - n: MPI's error code n

    // Sums `message` over the ranks, its first two words h + mark and h * h. Returns 0 where all sent the same h.
    long sum(long h, double mark = 0) {
        message[0] = (double)h + mark, message[1] = (double)h * (double)h;
        const int length = (int)message.size();
        int code;
        {
            const nb::gil_scoped_release other_threads_run;
            code = int_handles ? call<int>(length) : call<void *>(length);
        }
        if (code != 0) return FAILED - code;
        // Cauchy-Schwarz, see diagnostics.py. Not finite where MPI mixed up messages of different lengths.
        const double sum_h = message[0], sum_hh = message[1];
        if (!(sum_h >= 0 && sum_h < 0x1p53 && sum_hh >= 0 && sum_hh < 0x1p53)) return MISMATCH;
        using Wide = unsigned __int128;
        return (Wide)size * (Wide)sum_hh == (Wide)sum_h * (Wide)sum_h ? 0 : MISMATCH;
    }

    template <class Handle>
    int call(int length) const {
        using Allreduce = int (*)(const void *, void *, int, Handle, Handle, Handle);
        return ((Allreduce)function)((const void *)in_place, (void *)message.data(), length, handle<Handle>(datatype),
                                     handle<Handle>(op), handle<Handle>(comm));
    }

    template <class Handle>
    static Handle handle(uintptr_t number) {
        if constexpr (std::is_pointer_v<Handle>)
            return (Handle)number;
        else
            return (Handle)(intptr_t)number;
    }

    // Fills the mean and the biased variance of the group, from count, mean and M2 of this rank. Returns the count.
    // What follows where digits were lost is Python's.
    long sum_moments(long h, long count, const Vector &mean, const Vector &m2, const Output &merged) {
        const size_t channels = mean.size();
        message.resize(3 + 2 * channels);
        message[2] = (double)count;
        double *const first = message.data() + 3, *const second = first + channels;
        const double mark = pack(channels, (double)count, mean.data(), m2.data(), first, second) ? HIDDEN : 0;
        if (const long problem = sum(h, mark)) return problem;
        hidden = std::fmod(message[0], 1) > 0;
        const double total = message[2], divisor = std::max(total, 1.0);
        lost = mean_and_var(channels, divisor, first, second, merged.data(), merged.data() + channels);
        return (long)total;
    }

    long sum_vectors(long h, const Vector &a, const Vector &b, const Output &totals) {
        const size_t length = a.size();
        message.resize(3 + 2 * length);
        message[2] = 0;
        std::copy(a.data(), a.data() + length, message.data() + 3);
        std::copy(b.data(), b.data() + length, message.data() + 3 + length);
        if (const long problem = sum(h)) return problem;
        std::copy(message.data() + 3, message.data() + 3 + 2 * length, totals.data());
        return 0;
    }
};

// The running statistics moved towards those of a batch, in place, and one added to the tensor `batches`, if there is one:
// all or, where a value is not finite in their dtype or they are not arrays that this knows, none. Returns whether they
// were. In one call, since an interrupt of Python comes between calls; `changed` tells autograd, if it is not None.
bool update_running_stats(nb::handle running_mean_object, nb::handle running_var_object, nb::handle batches,
                         nb::handle changed, const Vector &mean, const Vector &var, double to_unbiased, double momentum) {
    for (const nb::handle object : {running_mean_object, running_var_object})  // what torch itself would refuse to change
        if (!PyObject_CheckBuffer(object.ptr()) && (nb::cast<bool>(object.attr("requires_grad")) || nb::cast<bool>(object.attr("is_inference")())))
            return false;
    Array running[2];
    if (!describe(running_mean_object, running[0], true) || !describe(running_var_object, running[1], true)) return false;
    const long channels = (long)mean.size();
    for (const Array &array : running)
        if (array.ndim != 1 || array.shape[0] != channels || array.stride[0] != 1 || array.dtype != running[0].dtype) return false;
    const DType dtype = running[0].dtype;
    // NumPy rounds its float16 from float64, torch by way of float32, as is done here.
    if (dtype == DType::f16 && PyObject_CheckBuffer(running_mean_object.ptr())) return false;
    const double *const means_in = mean.data(), *const vars_in = var.data(), limit = largest(dtype);
    bool fit = true;
    for (long c = 0; c < channels; ++c) fit &= std::fabs(means_in[c]) <= limit && vars_in[c] * to_unbiased <= limit;
    if (!fit) return false;
    // What may raise comes before anything is written.
    if (!batches.is_none()) batches.attr("add_")(1);
    if (!changed.is_none()) changed(nb::make_tuple(running_mean_object, running_var_object));
    const auto moved = [&](double old, double batch) {  // from the nearer end, as torch's lerp: a momentum of 1 gives batch
        return momentum < 0.5 ? old + momentum * (batch - old) : batch - (1 - momentum) * (batch - old);
    };
    return by_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        T *__restrict means = (T *)running[0].data, *__restrict vars = (T *)running[1].data;
        for (long c = 0; c < channels; ++c) {
            put(means[c], moved(value(means[c]), means_in[c]));
            put(vars[c], moved(value(vars[c]), vars_in[c] * to_unbiased));
        }
        return true;
    });
}

void invstd(const Vector &var, double eps, nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
    inverse_roots(var.size(), var.data(), eps, out.data());
}

// Whether per-channel vectors belong to an input as they should: x with at least 2 dimensions and a channel, all of its
// length and of one dtype, that of x or float32 for a half-precision x. Where not, functional.check_arguments finds out what is wrong, if anything is.
bool fits(nb::handle x_object, nb::handle weight_object, nb::handle bias_object, nb::handle running_mean_object,
          nb::handle running_var_object) {
    Array x;
    if (!describe(x_object, x) || x.ndim < 2 || x.shape[1] == 0) return false;
    if (running_mean_object.is_none() != running_var_object.is_none()) return false;
    const bool half = x.dtype == DType::f16 || x.dtype == DType::bf16;
    DType dtype = DType::none;  // that of the first of them
    for (const nb::handle object : {weight_object, bias_object, running_mean_object, running_var_object}) {
        Array vector;
        if (PyObject_CheckBuffer(object.ptr()) || !describe(object, vector)) return false;
        if (object.is_none()) continue;
        if (dtype == DType::none) dtype = vector.dtype;
        // One of length 0 has no data either, and is refused.
        if (vector.dtype != dtype || vector.ndim != 1 || vector.shape[0] != x.shape[1]) return false;
    }
    return dtype == DType::none || dtype == x.dtype || (half && dtype == DType::f32);
}
