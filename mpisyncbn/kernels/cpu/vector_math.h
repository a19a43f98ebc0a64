// Activations that need more than comparisons, and their derivatives, for a vector of values.
// Included once per instruction set by activation.h. W is float or double.
//
// All of them need the exponential of numbers below 0 alone, by symmetry. Numbers so far below 0
// that it would not be normal count as the limit: results there are within 1e-35 (float) of the
// exact ones, no instruction takes extra time for subnormal numbers, and none sets the flag
// FE_UNDERFLOW that kernels.h and moments.h look at. NaN stays NaN.
//
// The functions that take many instructions are not inlined: a loop has several copies of its body.

#define NOT_INLINED static __attribute__((noinline))

// Coefficients, from the constant on.
//     rest: (exp(r) - 1) / r = 1 + r * rest(r) for |r| <= ln(2) / 2, by reweighted least squares
//     above, below: erfcx(a / sqrt(2)) / 2 = above(a) / below(a) for 0 <= a <= -LIMIT, by Remez'
//         exchange. All are positive, so no digits are lost.
// The relative errors are those of exact arithmetic.
template <class W>
struct Fit;

template <>
struct Fit<float> {
    static constexpr int MANTISSA = 23, LOW_BITS = 12;
    static constexpr float ROUND = 0x1.8p23f, LN2_HI = 0.693359375f, LN2_LO = -2.12194440e-4f;
    static constexpr float TINY = 0x1p-40f;  // from here on to 0, squares may underflow
    static constexpr float EXP_LIMIT = -87.3f, GELU_LIMIT = -12.9f, GELU_TANH_LIMIT = -9.98f;
    static constexpr float rest[] = {0.49999998132f, 0.16666542668f, 0.041667204132f, 0.0083666475952f,
                                     0.0013882482878f};  // 1.3e-8
    static constexpr float above[] = {0.5f, 0.43498217712f, 0.18078837293f, 0.039810239409f,
                                      0.0039945648576f};  // 4.8e-9
    static constexpr float below[] = {1.0f,           1.6678492577f,   1.1923239465f,
                                      0.46301229667f, 0.099797121136f, 0.010012739093f};
};

template <>
struct Fit<double> {
    static constexpr int MANTISSA = 52, LOW_BITS = 27;
    static constexpr double ROUND = 0x1.8p52, LN2_HI = 0.693145751953125, LN2_LO = 1.42860682030941723212e-6;
    static constexpr double TINY = 0x1p-60;
    static constexpr double EXP_LIMIT = -708, GELU_LIMIT = -37.5, GELU_TANH_LIMIT = -21.1;
    static constexpr double rest[] = {0.50000000000000052843,    0.16666666666666588111,
                                      0.041666666666575333238,   0.0083333333333901952036,
                                      0.0013888888932065092452,  0.00019841269718098822377,
                                      0.000024801504637280030713, 2.7557407762257209614e-6,
                                      2.7626303224914441177e-7,  2.5053927987763587734e-8};  // 1.8e-17
    static constexpr double above[] = {0.5,                       0.77396531041842021261,
                                       0.59273074792847026534,    0.28839360194593118056,
                                       0.097278155544286048799,   0.023493833768577292303,
                                       0.0040620217918920892849,  0.00048647399215034346686,
                                       0.000036896366358131085844, 1.3697883194903203804e-6};  // 4.8e-17
    static constexpr double below[] = {1.0,
                                       2.3458151816396963675,
                                       2.5571512117845248658,
                                       1.7101526048570790015,
                                       0.77938163722910986829,
                                       0.25383717051578897138,
                                       0.060102850822593736064,
                                       0.010274464138731722353,
                                       0.0012228430139480643102,
                                       0.000092485475142043629849,
                                       3.4335501319054930995e-6};
};

template <class W, size_t COUNT>
INLINE vec<W> polynomial(const W (&coefficients)[COUNT], vec<W> x) {
    vec<W> sum = broadcast<W>(coefficients[COUNT - 1]);
    for (size_t i = 2; i <= COUNT; ++i) sum = sum * x + broadcast<W>(coefficients[COUNT - i]);
    return sum;
}

template <class W>
INLINE vec<W> at_least(vec<W> z, W least) {
    return z < least ? broadcast<W>(least) : z;
}

template <class W>
INLINE vec<W> at_most(vec<W> z, W most) {
    return z > most ? broadcast<W>(most) : z;
}

// -|z|, and at least the limit
template <class W>
INLINE vec<W> below_zero(vec<W> z, W limit) {
    using M = typename Lane<W>::mask;
    return at_least<W>((vec<W>)((M)z | (M)-vec<W>{}), limit);
}

// The exponential as a power of 2 and the rest: exp = power + power * rest.
template <class W>
struct Exponential {
    vec<W> power, rest;
    INLINE_MEMBER vec<W> value() const { return power * rest + power; }
    INLINE_MEMBER vec<W> minus_one() const { return power * rest + (power - 1); }
};

// The exponential of x + low, where x is from EXP_LIMIT to 0 and low is next to nothing. x is
// reduced by a multiple of ln(2) in two parts (Cody and Waite 1980). Adding ROUND leaves the number
// of times, rounded, in the lowest bits.
template <class W>
INLINE Exponential<W> exponential(vec<W> x, vec<W> low = vec<W>{}) {
    using F = Fit<W>;
    using M = typename Lane<W>::mask;
    const vec<W> shifted = x * broadcast<W>(1.44269504088896340736) + broadcast<W>(F::ROUND);
    const vec<W> times = shifted - broadcast<W>(F::ROUND);
    const vec<W> r = (x - times * broadcast<W>(F::LN2_HI)) - times * broadcast<W>(F::LN2_LO) + low;
    const vec<W> power = (vec<W>)(((M)shifted << F::MANTISSA) + (M)broadcast<W>(1));
    return {power, r * (r * polynomial<W>(F::rest, r) + 1)};
}

// The activations z * gate(z), where gate(z) + gate(-z) = 1: so it takes the gate and its derivative
// at x = -|z| alone. The gate's relative error is a few roundings, except of gelu_tanh: there it is
// |argument of tanh| roundings.
template <class W>
struct Gate {
    vec<W> value, slope;
};

template <Kind KIND, class W>
constexpr W limit = KIND == Kind::silu   ? Fit<W>::EXP_LIMIT
                    : KIND == Kind::gelu ? Fit<W>::GELU_LIMIT
                                         : Fit<W>::GELU_TANH_LIMIT;

template <class W>
INLINE Gate<W> sigmoid(vec<W> x) {
    const vec<W> e = exponential<W>(x).value(), value = e / (1 + e);
    return {value, value * (1 - value)};
}

// The normal distribution. exp(-x * x / 2) takes the square in two parts, of which the first is
// exact.
template <class W>
INLINE Gate<W> normal(vec<W> x) {
    using F = Fit<W>;
    using M = typename Lane<W>::mask;
    x = at_most<W>(x, -F::TINY);
    const vec<W> high = (vec<W>)((M)x & (M{} - 1) << F::LOW_BITS), half = broadcast<W>(-0.5);
    const vec<W> density = exponential<W>(high * high * half, (x - high) * (x + high) * half).value();
    return {density * polynomial<W>(F::above, -x) / polynomial<W>(F::below, -x),
            density * broadcast<W>(0.39894228040143267794)};
}

// Hendrycks and Gimpel 2016: (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2
template <class W>
INLINE Gate<W> normal_by_tanh(vec<W> x) {
    const vec<W> scale = broadcast<W>(1.59576912160573071176), cubic = broadcast<W>(0.07135481627260025180);
    x = at_most<W>(x, -Fit<W>::TINY);
    const vec<W> square = x * x * cubic;
    const Gate<W> of = sigmoid<W>(x * (square + scale));
    return {of.value, of.slope * (square * 3 + scale)};
}

template <Kind KIND, class W>
INLINE Gate<W> gate(vec<W> x) {
    if constexpr (KIND == Kind::silu) return sigmoid<W>(x);
    if constexpr (KIND == Kind::gelu) return normal<W>(x);
    if constexpr (KIND == Kind::gelu_tanh) return normal_by_tanh<W>(x);
}

template <Kind KIND, class W>
NOT_INLINED vec<W> gated(vec<W> z) {
    const vec<W> x = below_zero<W>(z, limit<KIND, W>), low = gate<KIND, W>(x).value;
    return z < 0 ? x * low : z * (1 - low);
}

template <Kind KIND, class W>
NOT_INLINED vec<W> gated_derivative(vec<W> z) {
    const vec<W> x = below_zero<W>(z, limit<KIND, W>);
    const Gate<W> low = gate<KIND, W>(x);
    const vec<W> derivative = x * low.slope + low.value;
    return z < 0 ? derivative : 1 - derivative;
}

template <class W>
NOT_INLINED vec<W> elu(vec<W> z, double alpha) {
    const vec<W> low = exponential<W>(below_zero<W>(z, Fit<W>::EXP_LIMIT)).minus_one();
    return z > 0 ? z : low * broadcast<W>(alpha);
}

template <class W>
NOT_INLINED vec<W> elu_derivative(vec<W> z, double alpha) {
    const vec<W> low = exponential<W>(below_zero<W>(z, Fit<W>::EXP_LIMIT)).value();
    return z > 0 ? broadcast<W>(1) : low * broadcast<W>(alpha);
}

template <class W>
INLINE vec<W> hardswish(vec<W> z) {
    const vec<W> low = z <= -3 ? vec<W>{} : z * (z + 3) * broadcast<W>(1 / 6.0);
    return z >= 3 ? z : low;
}

template <class W>
INLINE vec<W> hardswish_derivative(vec<W> z) {
    const vec<W> low = z <= -3 ? vec<W>{} : z * broadcast<W>(1 / 3.0) + broadcast<W>(0.5);
    return z >= 3 ? broadcast<W>(1) : low;
}
