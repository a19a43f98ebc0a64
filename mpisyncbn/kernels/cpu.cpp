// The four verbs for arrays in host memory, at the speed of memory. Formulas: kernels/__init__.py.
//
// Takes NumPy arrays and torch tensors alike, by address, shape and strides, so one build serves every torch.
// Here is what Python calls. cpu_arrays.h finds out how arrays lie in memory, cpu_tiles.h cuts the work into tiles;
// cpu_loops.h has the loops over a tile and cpu_lanes.h the vectors, both compiled once per instruction set, and the
// processor chooses at run time. cpu_link.h has what an exchange does, cpu_leave.h what a rank does at its end.
//
// The tiles depend on the shape alone, and their sums are added up in a fixed order: the same bits come out
// at any number of threads.

#include <nb_combined.cpp>  // nanobind itself, so that setuptools can build us without CMake

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cfenv>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <unistd.h>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace nb = nanobind;

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

namespace {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

float value(float v) { return v; }
double value(double v) { return v; }
float value(bfloat16 v) {
    const uint32_t wide = (uint32_t)v.bits << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
}
float value(float16 v) {
    const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                           : std::ldexp((float)mantissa, -24);
    return v.bits >> 15 ? -magnitude : magnitude;
}

template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What is known per channel, each kind in an array of its own.
enum { MEAN, SCALE, SHIFT, SLOPE, INTERCEPT, KINDS };
// Where a gradient meets a ReLU: nowhere; where the output, computed again from x, is not positive; where the
// output itself is not.
enum class Gate { none, recomputed, saved };

template <class T>
struct Pointers {
    const T *dy, *x, *extra;
    T *out;
    INLINE_MEMBER Pointers operator+(long i) const { return {dy + i, x + i, extra + i, out + i}; }
};

// Addresses and strides of up to four arrays of one shape. Planes: strides from sample to sample and from
// channel to channel; rows: from row to row, and 1.
template <class T>
struct Operands {
    Pointers<T> start;
    struct Strides {
        long dy, x, extra, out;
    } outer, channel;
    INLINE_MEMBER Pointers<T> pointers_at(long n, long c, long s) const {
        return {start.dy + (n * outer.dy + c * channel.dy + s), start.x + (n * outer.x + c * channel.x + s),
                start.extra + (n * outer.extra + c * channel.extra + s),
                start.out + (n * outer.out + c * channel.out + s)};
    }
    // Whether planes of this length follow each other without a gap.
    INLINE_MEMBER bool adjacent(long length) const {
        return channel.dy == length && channel.x == length && channel.extra == length && channel.out == length;
    }
};

// Samples, channels and positions of a piece of work; of rows, s0 to s1 are the rows and there are no samples.
struct Tile {
    long n0, n1, c0, c1, s0, s1;
    long slot;  // tiles of one slot have the same values per channel, of different channels
    long count() const { return (n1 - n0) * (s1 - s0); }  // of values per channel
};

// In place of a sum of squares: these are 0 in float32, but the differences are not.
constexpr double UNDERFLOWED = -1;
constexpr long MAX_CHANNELS = 256;  // of a tile of planes
constexpr int NDIM = 64;              // as many as NumPy has at most; torch may have more, which are refused

long padded(long length) { return (length + 15) / 16 * 16; }

std::atomic<long> streamed_values{0};  // for the tests: the values are the same

void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

template <class T>
struct Loops {
    using W = compute_t<T>;
    void (*row_origins)(const Operands<T> &, long rows, long columns, W *origins);
    void (*moments)(const Operands<T> &, const Tile &, bool rows, long count, const W *origins, W *scratch, double *,
                    double *, double *);
    void (*reduce)(const Operands<T> &, const Tile &, bool rows, Gate, const W *, long, W *scratch, double *, double *);
    void (*normalize)(const Operands<T> &, const Tile &, bool rows, bool stream, const W *, long, bool add, bool relu);
    void (*elementwise)(const Operands<T> &, const Tile &, bool rows, bool stream, const W *, long, bool gated);
};

namespace baseline {
#define LANES 4
#include "cpu_lanes.h"
#include "cpu_loops.h"
#undef LANES
}  // namespace baseline

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define HAVE_LEVELS
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(t) PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#define VECTOR_WIDTH_FLAG
#else
#define BEGIN_TARGET(t) PRAGMA(GCC push_options) PRAGMA(GCC target(t))
#define END_TARGET PRAGMA(GCC pop_options)
#define VECTOR_WIDTH_FLAG ",prefer-vector-width=512"
#endif

BEGIN_TARGET("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#include "cpu_lanes.h"
#include "cpu_loops.h"
#undef LANES
}  // namespace avx2
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" VECTOR_WIDTH_FLAG)
namespace avx512 {
#define LANES 16
#include "cpu_lanes.h"
#include "cpu_loops.h"
#undef LANES
}  // namespace avx512
END_TARGET

BEGIN_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" VECTOR_WIDTH_FLAG)
namespace avx512bf16 {  // for bfloat16 alone: rounding to it takes as long as all the rest otherwise
#define LANES 16
#define BF16_INSTRUCTIONS
#include "cpu_lanes.h"
#include "cpu_loops.h"
#undef BF16_INSTRUCTIONS
#undef LANES
}  // namespace avx512bf16
END_TARGET
#endif

enum class Level { baseline, avx2, avx512, avx512bf16 };
Level highest_level = Level::avx512bf16;  // lowered by tests, to have the others run

Level level() {
#ifdef HAVE_LEVELS
    auto has_avx512 = [] {
        return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    };
    static const Level best = has_avx512() ? __builtin_cpu_supports("avx512bf16") ? Level::avx512bf16 : Level::avx512
                              : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")  // and F16C, as all of them
                                  ? Level::avx2
                                  : Level::baseline;
    return std::min(best, highest_level);
#else
    return Level::baseline;
#endif
}

template <class T>
const Loops<T> &best_loops() {
#ifdef HAVE_LEVELS
    switch (level()) {
        case Level::avx512bf16:
            if constexpr (std::is_same_v<T, bfloat16>) return avx512bf16::loops<T>;
        case Level::avx512: return avx512::loops<T>;
        case Level::avx2: return avx2::loops<T>;
        default: break;
    }
#endif
    return baseline::loops<T>;
}

#include "cpu_arrays.h"
#include "cpu_tiles.h"

// The largest number of a dtype.
double largest(DType dtype) {
    return dtype == DType::f16    ? 65504.0
           : dtype == DType::bf16 ? 0x1.fep127
           : dtype == DType::f32  ? 0x1.fffffep127
                                  : 0x1.fffffffffffffp1023;
}

// A number rounded to what there is room for: to half precision by way of float32, as torch does.
void put(double &to, double v) { to = v; }
void put(float &to, double v) { to = (float)v; }
void put(bfloat16 &to, double v) { baseline::store_part(&to, baseline::vec<bfloat16>{(float)v}, 1); }
void put(float16 &to, double v) { baseline::store_part(&to, baseline::vec<float16>{(float)v}, 1); }

using Vector = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A vector of parameters, of whatever dtype and stride; null for an absent one. Two at a time.
const double *values_of(const Array &vector, long length, int which) {
    if (!vector.data) return nullptr;
    static thread_local std::vector<double> memory[2];
    memory[which].resize(length);
    double *const values = memory[which].data();
    if (vector.dtype == DType::f32)
        for (long c = 0; c < length; ++c) values[c] = ((const float *)vector.data)[c * vector.stride[0]];
    else
        for (long c = 0; c < length; ++c) values[c] = vector[c];
    return values;
}

// What the verbs return: extreme where the values of some channels are beyond what float32 can compute with, and
// extremes.py has to do these again.
enum { REFUSED, DONE, EXTREME };

int outcome(bool done, bool extreme) { return !done ? REFUSED : extreme ? EXTREME : DONE; }

// Where x - mean, times invstd, times invstd, stays within float32, whatever dy is. 0 stands for a constant channel, and
// NaN for one whose values are not finite, which no wider type can mend.
bool is_ordinary(double invstd) { return invstd == 0 || !(invstd < 0x1p-30 || invstd > 0x1p30); }
bool fits_float(double number) { return !(std::fabs(number) >= 0x1p127); }

// What the loops take per channel, from what the formulas take, in double and rounded once.
// x - mean is x - MEAN exactly where it matters, and what rounding the mean left goes into SHIFT and INTERCEPT.
template <class T>
const compute_t<T> *coefficients_of(const Plan<T> &plan, const Vector &mean, const Vector &invstd, const Array &weight,
                          const Array &bias, const double *mean_dy, const double *mean_dy_xmu, bool &extreme) {
    using W = compute_t<T>;
    const long columns = plan.traversals[0].columns, stride = padded(columns);
    W *const all = caller_scratch<W>(KINDS * stride);
    W *__restrict means_out = all + MEAN * stride, *__restrict scales = all + SCALE * stride;
    W *__restrict shifts = all + SHIFT * stride, *__restrict slopes = all + SLOPE * stride, *__restrict intercepts = all + INTERCEPT * stride;
    const double *const means = mean.data(), *const invstds = invstd.data();
    const double *const weights = values_of(weight, plan.channels, 0), *const biases = values_of(bias, plan.channels, 1);
    bool beyond = false;
    for (long c = 0; c < plan.channels; ++c) {
        const W center = (W)means[c];
        const double mean_lo = means[c] - (double)center, scale = weights ? invstds[c] * weights[c] : invstds[c];
        means_out[c] = center;
        scales[c] = (W)scale;
        shifts[c] = (W)((biases ? biases[c] : 0.0) - mean_lo * scale);
        if (sizeof(W) < 8) beyond |= !is_ordinary(invstds[c]) | !fits_float(scale);
    }
    if (mean_dy)
        for (long c = 0; c < plan.channels; ++c) {
            const double mean_lo = means[c] - (double)means_out[c], scale = weights ? invstds[c] * weights[c] : invstds[c];
            const double slope = -scale * (invstds[c] * (invstds[c] * mean_dy_xmu[c]));
            slopes[c] = (W)slope;
            intercepts[c] = (W)(-scale * mean_dy[c] - mean_lo * slope);
            if (sizeof(W) < 8) beyond |= std::isfinite(mean_dy_xmu[c]) && !fits_float(slope);
        }
    extreme = beyond;
    for (int kind = 0; kind < (mean_dy ? KINDS : SLOPE); ++kind) {
        W *row = all + kind * stride;
        for (long c = plan.channels; c < columns; ++c) row[c] = row[c - plan.channels];
        std::fill(row + columns, row + stride, W(0));
    }
    return all;
}

// Calls f with a value of the type that the loops have for a dtype.
template <class F>
bool by_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::f16: return f(float16{});
        case DType::bf16: return f(bfloat16{});
        case DType::f32: return f(float{});
        case DType::f64: return f(double{});
        default: return false;
    }
}

bool same_kind(const Array &x, std::initializer_list<const Array *> others) {
    return x.ndim >= 2 && std::all_of(others.begin(), others.end(), [&](const Array *other) {
               return !other->data || (other->dtype == x.dtype && other->ndim == x.ndim &&
                                       std::equal(x.shape, x.shape + x.ndim, other->shape));
           });
}

// Returns the count; -1 for what is refused, and -2 - count for what is extreme.
long local_moments(nb::handle x_object, const Output &out, int threads) {
    Array x, none;
    if (!describe(x_object, x) || !same_kind(x, {})) return -1;
    if (x.size() == 0) {
        std::fill(out.data(), out.data() + out.size(), 0.0);
        return 0;
    }
    bool extreme = false;
    const bool done = by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        using W = compute_t<T>;
        const Plan<T> *const plan = plan_for<T>(x, none, none, none, threads);
        if (!plan) return false;
        const Partials<T> found(*plan, 3);  // origin, sum of x - origin, sum of its square
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        const Traversal<T> &most = plan->traversals[0];
        W *const given = caller_scratch<W>(padded(most.columns) + 16);
        if (most.rows) loops.row_origins(most.on, most.count, most.columns, given);
        every_tile(*plan, Direction::down, [&](const Traversal<T> &traversal, const Tile &t, int i) {
            loops.moments(traversal.on, t, traversal.rows, t.count(), given + t.c0, tile_scratch<W>(3 * padded(t.c1 - t.c0)),
                          found.at(i, t, 0), found.at(i, t, 1), found.at(i, t, 2));
        });
        // Merged in a fixed order (Chan, Golub and LeVeque 1979), as distances from the first origin.
        const long channels = plan->channels, total = x.size() / channels;
        double *__restrict mean_hi = out.data(), *__restrict mean_lo = mean_hi + channels, *__restrict m2 = mean_lo + channels;
        std::copy(found.memory, found.memory + channels, mean_hi);
        std::fill(mean_lo, mean_lo + 2 * channels, 0.0);
        found.in_order([&](int i, long slot, const double *origin, long columns) {
            const double n = (double)plan->traversals[i].counts[slot], *const first = origin + columns;
            for (long c = 0; c < channels; ++c) mean_lo[c] += (origin[c] - mean_hi[c]) * n + first[c];
        });
        for (long c = 0; c < channels; ++c) mean_lo[c] /= (double)total;
        found.in_order([&](int i, long slot, const double *origin, long columns) {
            const double n = (double)plan->traversals[i].counts[slot], per = 1 / n, *const first = origin + columns, *const second = first + columns;
            for (long c = 0; c < channels; ++c) {
                const double from_origin = first[c] * per, from_mean = (origin[c] - mean_hi[c]) + from_origin - mean_lo[c];
                const double about_mean = second[c] == UNDERFLOWED ? DBL_MIN : std::max(second[c] - first[c] * from_origin, 0.0);
                m2[c] += about_mean + n * from_mean * from_mean;
            }
        });
        if (!std::is_same_v<T, double>)
            for (long c = 0; c < channels; ++c) mean_hi[c] += mean_lo[c];
        // Squares of distances below 2**-50 and above 2**50 may not be there, or be infinite. (Those of float16 are.)
        // Without any distance, the channel is constant.
        const double least = 0x1p-100 * (double)total, most_squares = 0x1p100 * (double)total;
        if (std::is_same_v<T, float> || std::is_same_v<T, bfloat16>)
            for (long c = 0; c < channels; ++c)
                extreme |= m2[c] != 0 && !std::isnan(mean_hi[c]) && !(m2[c] >= least && m2[c] <= most_squares);
        return true;
    });
    const long count = x.size() / x.shape[1];
    return !done ? -1 : extreme ? -2 - count : count;
}

int normalize(nb::handle x_object, const Vector &mean, const Vector &invstd, nb::handle weight_object,
               nb::handle bias_object, nb::handle residual_object, nb::handle y_object, bool relu, int threads) {
    Array x, weight, bias, residual, y;
    if (!describe(x_object, x) || !describe(weight_object, weight) || !describe(bias_object, bias) ||
        !describe(residual_object, residual) || !describe(y_object, y) || !same_kind(x, {&residual, &y}))
        return REFUSED;
    if (x.size() == 0) return DONE;
    bool extreme = false;
    const bool done = by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        const Plan<T> *const plan = plan_for<T>(x, Array{}, residual, y, threads);
        if (!plan) return false;
        const auto *all = coefficients_of(*plan, mean, invstd, weight, bias, nullptr, nullptr, extreme);
        const long stride = padded(plan->traversals[0].columns);
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        every_tile(*plan, Direction::up, [&](const Traversal<T> &traversal, const Tile &t, int i) {
            loops.normalize(traversal.on, t, traversal.rows, traversal.stream, all + t.c0, stride, residual.data, relu);
        });
        return true;
    });
    return outcome(done, extreme);
}

int backward_reduce(nb::handle dy_object, nb::handle x_object, const Vector &mean, const Vector &invstd,
                     nb::handle weight_object, nb::handle bias_object, nb::handle y_object, nb::handle dz_object,
                     bool relu, const Output &out, int threads) {
    Array dy, x, weight, bias, y, dz;
    if (!describe(dy_object, dy) || !describe(x_object, x) || !describe(weight_object, weight) ||
        !describe(bias_object, bias) || !describe(y_object, y) || !describe(dz_object, dz) || !same_kind(x, {&dy, &y, &dz}))
        return REFUSED;
    if (x.size() == 0) {
        std::fill(out.data(), out.data() + out.size(), 0.0);
        return DONE;
    }
    bool extreme = false;
    const Gate gate = y.data ? Gate::saved : relu ? Gate::recomputed : Gate::none;
    const bool done = by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        using W = compute_t<T>;
        const Plan<T> *const plan = plan_for<T>(x, dy, y, dz, threads);
        if (!plan) return false;
        const auto *all = coefficients_of(*plan, mean, invstd, weight, bias, nullptr, nullptr, extreme);
        const long stride = padded(plan->traversals[0].columns), channels = plan->channels;
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        const Partials<T> found(*plan, 2);
        std::atomic<bool> underflow{false};
        every_tile(*plan, Direction::down, [&](const Traversal<T> &traversal, const Tile &t, int i) {
            if (std::fetestexcept(FE_UNDERFLOW)) std::feclearexcept(FE_UNDERFLOW);  // the second is slow
            loops.reduce(traversal.on, t, traversal.rows, gate, all + t.c0, stride, tile_scratch<W>(3 * padded(t.c1 - t.c0)),
                         found.at(i, t, 0), found.at(i, t, 1));
            if (std::fetestexcept(FE_UNDERFLOW)) underflow = true;
        });
        double *__restrict sum_dy = out.data(), *__restrict sum_dy_xmu = sum_dy + channels;
        const double *const means = mean.data();
        std::fill(sum_dy, sum_dy + 2 * channels, 0.0);
        found.in_order([&](int, long, const double *first, long columns) {
            for (long c = 0; c < channels; ++c) sum_dy[c] += first[c], sum_dy_xmu[c] += first[c + columns];
        });
        for (long c = 0; c < channels; ++c)
            sum_dy_xmu[c] -= (means[c] - (double)(W)means[c]) * sum_dy[c];
        // Products so small may have lost digits, if one has underflown: those of a constant channel are 0. Those of an
        // infinite sum were too large, if dy and x are finite.
        const double least = 0x1p-100 * (double)(x.size() / channels);
        if (sizeof(W) < 8)
            for (long c = 0; c < channels; ++c) {
                const bool small = underflow && std::fabs(sum_dy_xmu[c]) < least;
                const bool finite = std::isfinite(sum_dy[c]) && std::isfinite(means[c]);
                extreme |= finite && (small || !std::isfinite(sum_dy_xmu[c]));
            }
        return true;
    });
    return outcome(done, extreme);
}

int backward_elementwise(nb::handle dy_object, nb::handle x_object, const Vector &mean, const Vector &invstd,
                          nb::handle weight_object, nb::handle bias_object, const Vector &mean_dy,
                          const Vector &mean_dy_xmu, nb::handle dx_object, bool relu, int threads) {
    Array dy, x, weight, bias, dx;
    if (!describe(dy_object, dy) || !describe(x_object, x) || !describe(weight_object, weight) ||
        !describe(bias_object, bias) || !describe(dx_object, dx) || !same_kind(x, {&dy, &dx}))
        return REFUSED;
    if (x.size() == 0) return DONE;
    bool extreme = false;
    const bool done = by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        const Plan<T> *const plan = plan_for<T>(x, dy, Array{}, dx, threads);
        if (!plan) return false;
        const auto *all = coefficients_of(*plan, mean, invstd, weight, bias, mean_dy.data(), mean_dy_xmu.data(), extreme);
        const long stride = padded(plan->traversals[0].columns);
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        every_tile(*plan, Direction::up, [&](const Traversal<T> &traversal, const Tile &t, int i) {
            loops.elementwise(traversal.on, t, traversal.rows, traversal.stream, all + t.c0, stride, relu);
        });
        return true;
    });
    return outcome(done, extreme);
}

#include "cpu_link.h"
#include "cpu_leave.h"

}  // namespace

NB_MODULE(_cpu, m) {
    // A communicator lives as long as MPI, longer than the interpreter; nanobind would complain at exit.
    nb::set_leak_warnings(false);
    const auto given = nb::arg();
    const auto maybe = nb::arg().none();  // None, where there is no such array
    nb::class_<Link>(m, "Link")
        .def(
            "__init__",
            [](Link *link, uintptr_t function, uintptr_t comm, uintptr_t datatype, uintptr_t op, intptr_t in_place,
               bool int_handles, int size) {
                new (link) Link{function, comm, datatype, op, (uintptr_t)in_place, int_handles, size, {}, false, false};
            })
        .def_ro("lost", &Link::lost)
        .def_ro("hidden", &Link::hidden)
        .def("sum_moments", &Link::sum_moments)
        .def("sum_vectors", &Link::sum_vectors);
    m.def("leave_in_finalize", [](const std::vector<uintptr_t> &functions, uintptr_t self, uintptr_t world, uintptr_t byte,
                                  int any_source, bool int_handles) {
        mpi = {functions.at(2), functions.at(3), functions.at(4), functions.at(5), functions.at(6), functions.at(7),
               world, byte, any_source, int_handles};
        const auto attach = int_handles ? leave_in_finalize<int> : leave_in_finalize<void *>;
        return attach(functions[0], functions[1], self);
    });
    m.def("about_to_leave", [](uintptr_t comm, int rank, long exchanges, double limit, const std::vector<std::string> &hosts) {
        groups.push_back({comm, rank, exchanges, limit, hosts});
    });
    m.def("update_running_stats", &update_running_stats, given, given, maybe, maybe, given, given, given, given);
    m.def("invstd", &invstd);
    m.def("fits", &fits, given, maybe, maybe, maybe, maybe);
    m.def("local_moments", &local_moments);
    m.def("normalize", &normalize, given, given, given, maybe, maybe, maybe, given, given, given);
    m.def("backward_reduce", &backward_reduce, given, given, given, given, maybe, maybe, maybe, maybe, given, given, given);
    m.def("backward_elementwise", &backward_elementwise, given, given, given, given, maybe, maybe, given, given, given,
          given, given);
    m.def("instruction_set", [] {
        const char *const names[] = {"baseline", "avx2", "avx512", "avx512 with bfloat16"};
        return names[(int)level()];
    });
    m.def("threads", &default_threads);
    m.attr("most_dimensions") = NDIM;
    m.def("limit", [](int highest) { highest_level = (Level)highest; });
    m.def("stream_from", [](long bytes) { stream_from = bytes; });
    m.def("streamed_values", [] { return streamed_values.exchange(0); });
}
