// Half-precision numbers, and the arguments of the loops: addresses, tiles, coefficients. Part of
// every source file.

#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER
// for functions of many instructions with several callers, so that they are compiled once
#define NOT_INLINED static __attribute__((noinline))

namespace mpisyncbn {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float value(float v) { return v; }
inline double value(double v) { return v; }
inline float value(bfloat16 v) {
    const uint32_t wide = (uint32_t)v.bits << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
}
inline float value(float16 v) {
    const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                           : std::ldexp((float)mantissa, -24);
    return v.bits >> 15 ? -magnitude : magnitude;
}

template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The coefficients of a channel, each kind in an array of its own.
enum { MEAN, SCALE, SHIFT, SLOPE, INTERCEPT, KINDS };
// The activation that a layer ends in, see activation.h. kernels/activation.py has the same
// numbers.
enum class Kind { none, relu, leaky_relu, silu, hardswish, elu, gelu, gelu_tanh };
struct Activation {
    Kind kind;
    double parameter;  // the slope of a leaky ReLU below 0, the alpha of an ELU
};
// Where the activation's input comes from: x alone; x and a residual; the output, given beside x, whose
// sign determines the derivative; or, undone, the output in place of x.
enum class Source { x, residual, output, undone };

// Bytes after the mask of each sample, as many as a vector may read there.
constexpr long MASK_PAD = 16;
// Its address stands in for an absent mask. No loop reads there.
inline constexpr int8_t NO_MASK = 0;

template <class T>
struct Pointers {
    const T *dy, *x, *extra;
    T *out;
    const int8_t *mask;  // a byte for each position, not 0 if it counts. See masks.h
    INLINE_MEMBER Pointers operator+(long i) const { return {dy + i, x + i, extra + i, out + i, mask + i}; }
    // For rows: the pointers of other columns, which have the same mask.
    INLINE_MEMBER Pointers columns_from(long j) const { return {dy + j, x + j, extra + j, out + j, mask}; }
    // For planes: the pointers for a plane that has `before` values before it. The mask begins again with
    // each plane, so its index is i - before.
    INLINE_MEMBER Pointers after(long before) const { return {dy, x, extra, out, mask - before}; }
};

// Addresses and strides of up to four arrays of one shape. For planes the strides are from sample
// to sample and from channel to channel; for rows from row to row, and 1.
template <class T>
struct Operands {
    Pointers<T> start;
    struct Strides {
        long dy, x, extra, out, mask;
    } outer, channel;              // a mask has no channels: its stride is 0
    const uint8_t *row_of_column;  // with a mask, if rows are taken together: the row of each column
    INLINE_MEMBER Pointers<T> pointers_at(long n, long c, long s) const {
        return {start.dy + (n * outer.dy + c * channel.dy + s), start.x + (n * outer.x + c * channel.x + s),
                start.extra + (n * outer.extra + c * channel.extra + s),
                start.out + (n * outer.out + c * channel.out + s), start.mask + (n * outer.mask + s)};
    }
    INLINE_MEMBER bool masked() const { return start.mask != &NO_MASK; }
    // Whether a value counts.
    INLINE_MEMBER bool counts(long n, long c, long s) const {
        return !masked() || start.mask[n * outer.mask + (row_of_column ? row_of_column[c] : 0) + s];
    }
    // Whether there is an array to write: the address of x stands in for an absent one.
    INLINE_MEMBER bool stores() const { return start.out != start.x; }
    // Whether planes of this length follow each other without a gap.
    INLINE_MEMBER bool adjacent(long length) const {
        return channel.dy == length && channel.x == length && channel.extra == length &&
               channel.out == length &&
               (!masked() || outer.mask == length || outer.mask == length + MASK_PAD);
    }
};

// A piece of work: samples n0 to n1, channels c0 to c1, positions s0 to s1. For rows, s0 to s1 are
// the rows, and there is one sample.
struct Tile {
    long n0, n1, c0, c1, s0, s1;
    long slot;  // the tiles of a slot have the same positions, of different channels
    long count() const { return (n1 - n0) * (s1 - s0); }  // values per channel, without a mask
};

// The number of values in each column of a tile.
struct Counts {
    const long *of_set;  // a set of columns is one row of those taken together
    long sets, channels;
    INLINE_MEMBER long operator()(long column) const { return of_set[sets == 1 ? 0 : column / channels]; }
    bool any() const { return std::any_of(of_set, of_set + sets, [](long n) { return n > 0; }); }
};

// Takes the place of a sum of squares that are 0 in float32, although the distances are not.
constexpr double UNDERFLOWED = -1;
constexpr long MAX_CHANNELS = 256;  // in a tile of planes
constexpr int NDIM = 64;            // the most that NumPy allows; torch's may have more, and are refused

inline long padded(long length) { return (length + 15) / 16 * 16; }

inline std::atomic<long> streamed_values{0};  // for tests, since results do not show it

inline void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

template <class T>
struct Loops {
    using W = compute_t<T>;
    void (*row_origins)(const T *const *rows, long few, long columns, W *origins);
    void (*moments)(const Operands<T> &, const Tile &, bool rows, Counts, const W *origins, W *scratch,
                    double *, double *, double *);
    void (*reduce)(const Operands<T> &, const Tile &, bool rows, Activation, Source, const W *, long,
                   W *scratch, double *, double *);
    void (*normalize)(const Operands<T> &, const Tile &, bool rows, bool stream, const W *, long,
                      Activation, Source);
    void (*elementwise)(const Operands<T> &, const Tile &, bool rows, bool stream, const W *, long,
                        Activation, Source);
};

}  // namespace mpisyncbn
