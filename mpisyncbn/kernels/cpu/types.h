// Half-precision numbers, and the arguments of the loops: addresses, tiles, coefficients. Part of
// module.cpp.

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

// The coefficients of a channel, each kind in an array of its own.
enum { MEAN, SCALE, SHIFT, SLOPE, INTERCEPT, KINDS };
// The activation that a layer ends in, see activation.h. kernels/activation.py has the same
// numbers.
enum class Kind { none, relu, leaky_relu, silu, hardswish, elu, gelu, gelu_tanh };
struct Activation {
    Kind kind;
    double parameter;  // the slope of a leaky ReLU below 0, the alpha of an ELU
};
// Where the activation's input comes from: from x alone, from x and a residual, where the sign
// decides, from the output beside x, or, undone, from the output in place of x.
enum class Source { x, residual, output, undone };

template <class T>
struct Pointers {
    const T *dy, *x, *extra;
    T *out;
    INLINE_MEMBER Pointers operator+(long i) const { return {dy + i, x + i, extra + i, out + i}; }
};

// Addresses and strides of up to four arrays of one shape. For planes the strides are from sample
// to sample and from channel to channel; for rows from row to row, and 1.
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
    // Whether there is an array to write: the address of x stands in for an absent one.
    INLINE_MEMBER bool stores() const { return start.out != start.x; }
    // Whether planes of this length follow each other without a gap.
    INLINE_MEMBER bool adjacent(long length) const {
        return channel.dy == length && channel.x == length && channel.extra == length &&
               channel.out == length;
    }
};

// A piece of work: samples n0 to n1, channels c0 to c1, positions s0 to s1. For rows, s0 to s1 are
// the rows, and there is one sample.
struct Tile {
    long n0, n1, c0, c1, s0, s1;
    long slot;  // the tiles of a slot have the same number of values, of different channels
    long count() const { return (n1 - n0) * (s1 - s0); }  // values per channel
};

// Stands for a sum of squares that are 0 in float32, although the distances are not.
constexpr double UNDERFLOWED = -1;
constexpr long MAX_CHANNELS = 256;  // in a tile of planes
constexpr int NDIM = 64;            // the most that NumPy allows; torch's may have more, and are refused

long padded(long length) { return (length + 15) / 16 * 16; }

std::atomic<long> streamed_values{0};  // for tests, since results do not show it

void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

template <class T>
struct Loops {
    using W = compute_t<T>;
    void (*row_origins)(const Operands<T> &, long rows, long columns, W *origins);
    void (*moments)(const Operands<T> &, const Tile &, bool rows, long count, const W *origins, W *scratch,
                    double *, double *, double *);
    void (*reduce)(const Operands<T> &, const Tile &, bool rows, Activation, Source, const W *, long,
                   W *scratch, double *, double *);
    void (*normalize)(const Operands<T> &, const Tile &, bool rows, bool stream, const W *, long,
                      Activation, Source);
    void (*elementwise)(const Operands<T> &, const Tile &, bool rows, bool stream, const W *, long,
                        Activation, Source);
};
