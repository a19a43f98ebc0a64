// The arithmetic of an exchange, as merging.py has it: from the moments of ranks to those of their group.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

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

// merging.py and exchange.py have these numbers too, and give the reasons. A variance below
// CANCELLATION * mean**2 has lost digits in the sums. If there is no variance, rounding leaves up to
// ROUNDING * mean**2. A rank adds ABSORBED_FLAG to its header if the sum of squares absorbs some M2.
constexpr double CANCELLATION = 1e-8, ROUNDING = 1e-15, ABSORBED_FLAG = 0x1p-18;

// Computes mean and biased variance from sums. Returns whether some variance has lost digits by
// cancellation.
WITH_AVX inline bool mean_and_var(size_t channels, double count, const double *__restrict sums,
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
WITH_AVX inline bool pack(size_t channels, double count, const double *__restrict mean, const double *__restrict m2,
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

// Finds the channels whose variance has lost digits, and the number to take their sums about: the
// mean as a float32 number; 0 for all others. Returns whether all of these channels may be constant.
inline bool find_origins(size_t channels, const double *mean, const double *var, double *origin) {
    bool all_constant = true;
    for (size_t c = 0; c < channels; ++c) {
        const double square = mean[c] * mean[c], rounded = (double)(float)mean[c];
        const bool cancelled = var[c] < CANCELLATION * square;
        origin[c] = cancelled ? rounded : 0;
        const bool constant = std::fabs(var[c]) <= ROUNDING * square &&
                              std::fabs(mean[c] - rounded) <= ROUNDING * std::fabs(mean[c]);
        if (cancelled && !constant) all_constant = false;
    }
    return all_constant;
}

// The moments of a group from a row for each rank: two words of fingerprint, count, mean in two
// parts, M2. Means are taken as distances from that of the first rank with data. Returns the count.
inline double merge_rows(int ranks, size_t channels, const double *rows, double *mean, double *var) {
    const size_t length = 3 + 3 * channels;
    double total = 0;
    int first = -1;
    for (int rank = 0; rank < ranks; ++rank) {
        const double count = rows[rank * length + 2];
        if (first < 0 && count > 0) first = rank;
        total += count;
    }
    const double divisor = std::max(total, 1.0), *const origin = rows + std::max(first, 0) * length + 3;
    for (size_t c = 0; c < channels; ++c) {
        const auto row = [&](int rank) { return rows + rank * length + 3 + c; };
        const auto count = [&](int rank) { return rows[rank * length + 2]; };
        const auto distance = [&](int rank) { return (*row(rank) - origin[c]) + row(rank)[channels]; };
        double sum = count(0) * distance(0);
        for (int rank = 1; rank < ranks; ++rank) sum += count(rank) * distance(rank);
        const double center = sum / divisor;
        const auto square = [&](int rank) {
            const double off = distance(rank) - center;
            return row(rank)[2 * channels] + count(rank) * (off * off);
        };
        double squares = square(0);
        for (int rank = 1; rank < ranks; ++rank) squares += square(rank);
        mean[c] = origin[c] + center, var[c] = squares / divisor;
    }
    return total;
}

WITH_AVX inline void inverse_roots(size_t channels, const double *__restrict var, double eps,
                            double *__restrict out) {
    for (size_t c = 0; c < channels; ++c) out[c] = 1 / std::sqrt(var[c] + eps);
}

// (var + eps) ** -0.5; 0 for a constant channel if eps is 0.
inline void inverse_deviations(size_t channels, const double *var, double eps, double *invstd) {
    inverse_roots(channels, var, eps, invstd);
    if (eps == 0)
        for (size_t c = 0; c < channels; ++c)
            if (var[c] < DBL_MIN) invstd[c] = 0;
}
