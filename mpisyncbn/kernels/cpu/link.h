// The exchange of moments and sums in native code. Part of module.cpp.

// This file must not use fused multiply-adds, which round differently from NumPy. (Compilers use
// them unasked for some processors.)
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__FMA__) || defined(__aarch64__)
#pragma GCC optimize("fp-contract=off")
#endif

// Four divisions and roots at a time, if the processor can. A target above AVX may bring fused
// multiply-adds.
#if defined(__x86_64__)
#define WITH_AVX __attribute__((target_clones("avx", "default")))
#else
#define WITH_AVX
#endif

// exchange.py has both numbers too, and gives the reasons. A variance below CANCELLATION * mean**2
// has lost digits in the sums. A rank adds ABSORBED_FLAG to its header if the sum of squares
// absorbs some M2.
constexpr double CANCELLATION = 1e-8, ABSORBED_FLAG = 0x1p-18;

// Computes mean and biased variance from sums. Returns whether some variance has lost digits by
// cancellation.
WITH_AVX bool mean_and_var(size_t channels, double count, const double *__restrict sums,
                           const double *__restrict squares, double *__restrict mean,
                           double *__restrict var) {
    int64_t cancelled = 0;
    for (size_t c = 0; c < channels; ++c) {
        const double center = sums[c] / count, square = center * center,
                     variance = squares[c] / count - square;
        mean[c] = center;
        var[c] = variance;
        cancelled |= variance < CANCELLATION * square ? 1 : 0;
    }
    return cancelled;
}

// Packs a rank's moments. Returns whether some M2 is absorbed, so that it will not show in the
// sums. It fills one array after the other, because a store 4096 bytes apart from a load holds up
// the load.
WITH_AVX bool pack(size_t channels, double count, const double *__restrict mean, const double *__restrict m2,
                   double *__restrict sums, double *__restrict squares) {
    for (size_t c = 0; c < channels; ++c) sums[c] = mean[c] * count;
    int64_t absorbed = 0;
    for (size_t c = 0; c < channels; ++c) {
        const double square = mean[c] * sums[c] + m2[c];
        squares[c] = square;
        absorbed |= (m2[c] < CANCELLATION * square ? 1 : 0) & (m2[c] != 0 ? 1 : 0);
    }
    return absorbed;
}

// An exchange in one call: pack, MPI_Allreduce, check, merge. exchange.py does the same with NumPy
// and mpi4py, in the same order and with the same roundings, but their calls take longer.
//
// MPI's function and its handles come from mpi4py as numbers, so that one build serves every MPI
// library. A handle is an int in some libraries (MPICH and its relatives), a pointer in others
// (Open MPI).
//
// Only one thread at a time may use a Link: exchange.py holds the communicator's lock.
struct Link {
    uintptr_t function, comm, datatype, op, in_place;
    bool int_handles;
    int size;
    std::vector<double> message;

    // The problem with a message: none, MISMATCH if the ranks sent different h, else MPI's error
    // code, which is positive.
    enum { NO_PROBLEM = 0, MISMATCH = -1 };

    // Sums `message` over the ranks, after setting its first two words to h + flag and h * h.
    // Returns the problem.
    int sum(long h, double flag = 0) {
        message[0] = (double)h + flag, message[1] = (double)h * (double)h;
        const int length = (int)message.size();
        int code;
        {
            const nb::gil_scoped_release other_threads_run;
            code = int_handles ? call<int>(length) : call<void *>(length);
        }
        if (code != 0) return code;
        // Cauchy-Schwarz, see fingerprint.py. The sums may not be finite if MPI mixed up messages
        // of different lengths.
        const double sum_h = message[0], sum_hh = message[1];
        if (!(sum_h >= 0 && sum_h < 0x1p53 && sum_hh >= 0 && sum_hh < 0x1p53)) return MISMATCH;
        using Integer = unsigned __int128;
        return (Integer)size * (Integer)sum_hh == (Integer)sum_h * (Integer)sum_h ? NO_PROBLEM : MISMATCH;
    }

    template <class Handle>
    int call(int length) const {
        using Allreduce = int (*)(const void *, void *, int, Handle, Handle, Handle);
        return ((Allreduce)function)((const void *)in_place, (void *)message.data(), length,
                                     handle<Handle>(datatype), handle<Handle>(op), handle<Handle>(comm));
    }

    template <class Handle>
    static Handle handle(uintptr_t number) {
        if constexpr (std::is_pointer_v<Handle>)
            return (Handle)number;
        else
            return (Handle)(intptr_t)number;
    }

    // Fills the mean and the biased variance of the group, from count, mean and M2 of this rank.
    // Returns the problem, the count of the group, whether some variance has lost digits by
    // cancellation, and whether some rank said that an M2 of its own was absorbed. exchange.py
    // recovers the digits.
    std::tuple<int, long, bool, bool> sum_moments(long h, long count, const Vector &mean, const Vector &m2,
                                                  const Output &merged) {
        const size_t channels = mean.size();
        message.resize(3 + 2 * channels);
        message[2] = (double)count;
        double *const sums = message.data() + 3, *const squares = sums + channels;
        const double flag =
            pack(channels, (double)count, mean.data(), m2.data(), sums, squares) ? ABSORBED_FLAG : 0;
        if (const int problem = sum(h, flag)) return {problem, 0, false, false};
        const bool absorbed = std::fmod(message[0], 1) > 0;
        const double total = message[2], divisor = std::max(total, 1.0);
        const bool cancelled =
            mean_and_var(channels, divisor, sums, squares, merged.data(), merged.data() + channels);
        return {NO_PROBLEM, (long)total, cancelled, absorbed};
    }

    // Fills the sums over the ranks of two vectors of one length. Returns the problem.
    int sum_vectors(long h, const Vector &a, const Vector &b, const Output &totals) {
        const size_t length = a.size();
        message.resize(3 + 2 * length);
        message[2] = 0;
        std::copy(a.data(), a.data() + length, message.data() + 3);
        std::copy(b.data(), b.data() + length, message.data() + 3 + length);
        if (const int problem = sum(h)) return problem;
        std::copy(message.data() + 3, message.data() + 3 + 2 * length, totals.data());
        return NO_PROBLEM;
    }
};
