// Activations that need more than comparisons, and their derivatives, for a vector of values.
// Included once per instruction set by activation.h. T is float, double, or bfloat16, which stands
// for float16 too: half precision makes do with shorter polynomials, in float.
//
// All of them need the exponential of numbers below 0 alone, by symmetry. Numbers so far below 0
// that it would not be normal count as the limit: results there are within 1e-35 (double: 1e-302) of
// the exact ones, and no derivative sets the flag FE_UNDERFLOW, which kernels.h looks at, or takes
// extra time for subnormal numbers. NaN stays NaN.

template <class T>
using fit_t = std::conditional_t<sizeof(T) == 2, bfloat16, T>;

// Coefficients of polynomials, from the constant on, and their relative error before rounding.
//     rest: (exp(r) - 1) / r = 1 + r * rest(r) for |r| <= ln(2) / 2, by reweighted least squares
//     above, below: erfcx(-x / sqrt(2)) / 2 = above(x) / below(x) from GELU_LIMIT to 0, by Remez'
//         exchange. Their signs alternate and x is negative, so that no digits are lost.
// ROUND has the bias of exponents as its lowest bits.
template <class T>
struct Fit;

template <>
struct Fit<float> {
    static constexpr int MANTISSA = 23, LOW_BITS = 12;
    static constexpr float ROUND = 0x1.8p23f + 127, LN2_HI = 0.693359375f, LN2_LO = -2.12194440e-4f;
    static constexpr float TINY = 0x1p-40f;  // from here on to 0, squares may underflow
    static constexpr float EXP_LIMIT = -87.3f, GELU_LIMIT = -12.9f, GELU_TANH_LIMIT = -9.98f;
    static constexpr float rest[] = {0.49999998132f, 0.16666542668f, 0.041667204132f, 0.0083666475952f,
                                     0.0013882482878f};  // 1.3e-8
    static constexpr float above[] = {0.5f, -0.43498217712f, 0.18078837293f, -0.039810239409f,
                                      0.0039945648576f};  // 4.8e-9
    static constexpr float below[] = {1.0f,            -1.6678492577f,  1.1923239465f,
                                      -0.46301229667f, 0.099797121136f, -0.010012739093f};
};

template <>
struct Fit<bfloat16> : Fit<float> {
    static constexpr float LN2_HI = 0.69314718056f, LN2_LO = 0;
    static constexpr float rest[] = {0.50001666246f, 0.16749961361f, 0.041609757838f};    // 2.1e-5
    static constexpr float above[] = {0.5000111897f, -0.27660676587f, 0.061824365613f};  // 2.2e-5
    static constexpr float below[] = {1.0f, -1.3517998386f, 0.69871206539f, -0.15477743224f};
};

template <>
struct Fit<double> {
    static constexpr int MANTISSA = 52, LOW_BITS = 27;
    static constexpr double ROUND = 0x1.8p52 + 1023;
    static constexpr double LN2_HI = 0.693145751953125, LN2_LO = 1.42860682030941723212e-6;
    static constexpr double TINY = 0x1p-60;
    static constexpr double EXP_LIMIT = -708, GELU_LIMIT = -37.5, GELU_TANH_LIMIT = -21.1;
    static constexpr double rest[] = {0.50000000000000052843, 0.16666666666666588111,
                                      0.041666666666575333238, 0.0083333333333901952036,
                                      0.0013888888932065092452, 0.00019841269718098822377,
                                      0.000024801504637280030713, 2.7557407762257209614e-6,
                                      2.7626303224914441177e-7, 2.5053927987763587734e-8};  // 1.8e-17
    static constexpr double above[] = {0.5, -0.77396531041842021261,
                                       0.59273074792847026534, -0.28839360194593118056,
                                       0.097278155544286048799, -0.023493833768577292303,
                                       0.0040620217918920892849, -0.00048647399215034346686,
                                       0.000036896366358131085844, -1.3697883194903203804e-6};  // 4.8e-17
    static constexpr double below[] = {1.0, -2.3458151816396963675,
                                       2.5571512117845248658, -1.7101526048570790015,
                                       0.77938163722910986829, -0.25383717051578897138,
                                       0.060102850822593736064, -0.010274464138731722353,
                                       0.0012228430139480643102, -0.000092485475142043629849,
                                       3.4335501319054930995e-6};
};

template <class T, size_t COUNT>
INLINE vec<T> polynomial(const compute_t<T> (&coefficients)[COUNT], vec<T> x) {
    vec<T> sum = broadcast<T>(coefficients[COUNT - 1]);
    for (size_t i = 2; i <= COUNT; ++i) sum = sum * x + broadcast<T>(coefficients[COUNT - i]);
    return sum;
}

// -|z|, and at least the limit
template <class T>
INLINE vec<T> below_zero(vec<T> z, compute_t<T> limit) {
    using M = typename Lane<T>::mask;
    return larger(broadcast<T>(limit), (vec<T>)((M)z | (M)-vec<T>{}));
}

// The exponential as power * (1 + rest), where power is a power of 2.
template <class T>
struct Exponential {
    vec<T> power, rest;
    INLINE_MEMBER vec<T> value() const { return (rest + 1) * power; }
    INLINE_MEMBER vec<T> minus_one() const { return power * rest + (power - 1); }
};

// The exponential of x + low, where x is from EXP_LIMIT to 0 and low is tiny. x is
// reduced by a multiple of ln(2) in two parts (Cody and Waite 1980). Adding ROUND leaves the
// multiple, rounded, in the lowest bits, which are then the exponent.
template <class T, class... Low>
INLINE Exponential<T> exponential(vec<T> x, Low... low) {
    using F = Fit<T>;
    using M = typename Lane<T>::mask;
    const vec<T> shifted = x * broadcast<T>(1.44269504088896340736) + broadcast<T>(F::ROUND);
    const vec<T> times = shifted - broadcast<T>(F::ROUND);
    vec<T> r = x - times * broadcast<T>(F::LN2_HI);
    if constexpr (F::LN2_LO != 0) r -= times * broadcast<T>(F::LN2_LO);
    ((r += low), ...);
    return {(vec<T>)((M)shifted << F::MANTISSA), r * (r * polynomial<T>(F::rest, r) + 1)};
}

// The activations z * gate(z), where gate(z) + gate(-z) = 1, so that x = -|z| is enough. The gate's
// relative error is a few roundings; that of gelu_tanh grows with its argument.
template <class T>
struct Gate {
    vec<T> value, slope;
};

template <Kind KIND, class T>
constexpr compute_t<T> limit = KIND == Kind::silu   ? Fit<T>::EXP_LIMIT
                               : KIND == Kind::gelu ? Fit<T>::GELU_LIMIT
                                                    : Fit<T>::GELU_TANH_LIMIT;

template <class T>
INLINE Gate<T> sigmoid(vec<T> x) {
    const vec<T> e = exponential<T>(x).value(), value = e / (1 + e);
    return {value, value * (1 - value)};
}

// The normal distribution. The exponential takes the square in two parts, of which the first is
// exact.
template <class T>
INLINE Gate<T> normal(vec<T> x) {
    using F = Fit<T>;
    using M = typename Lane<T>::mask;
    x -= F::TINY;
    const vec<T> half = broadcast<T>(-0.5);
    vec<T> density;
    if constexpr (sizeof(T) == 2) {
        density = exponential<T>(x * x * half).value();
    } else {
        const vec<T> high = (vec<T>)((M)x & (M{} - 1) << F::LOW_BITS);
        density = exponential<T>(high * high * half, (x - high) * (x + high) * half).value();
    }
    return {density * polynomial<T>(F::above, x) / polynomial<T>(F::below, x),
            density * broadcast<T>(0.39894228040143267794)};
}

// Hendrycks and Gimpel 2016: (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2
template <class T>
INLINE Gate<T> normal_by_tanh(vec<T> x) {
    const vec<T> scale = broadcast<T>(1.59576912160573071176), cubic = broadcast<T>(0.07135481627260025180);
    x -= Fit<T>::TINY;
    const vec<T> square = x * x * cubic;
    const Gate<T> of = sigmoid<T>(x * (square + scale));
    return {of.value, of.slope * (square * 3 + scale)};
}

template <Kind KIND, class T>
INLINE Gate<T> gate(vec<T> x) {
    if constexpr (KIND == Kind::silu) return sigmoid<T>(x);
    if constexpr (KIND == Kind::gelu) return normal<T>(x);
    if constexpr (KIND == Kind::gelu_tanh) return normal_by_tanh<T>(x);
}

template <Kind KIND, class T>
NOT_INLINED vec<T> gated(vec<T> z) {
    const vec<T> x = below_zero<T>(z, limit<KIND, T>), low = gate<KIND, T>(x).value;
    return x * low + larger(vec<T>{}, z);
}

template <Kind KIND, class T>
NOT_INLINED vec<T> gated_derivative(vec<T> z) {
    const vec<T> x = below_zero<T>(z, limit<KIND, T>);
    const Gate<T> low = gate<KIND, T>(x);
    const vec<T> derivative = x * low.slope + low.value;
    return z < 0 ? derivative : 1 - derivative;
}

template <class T>
NOT_INLINED vec<T> elu(vec<T> z, compute_t<T> alpha) {
    const vec<T> low = exponential<T>(below_zero<T>(z, Fit<T>::EXP_LIMIT)).minus_one();
    return z > 0 ? z : low * alpha;
}

template <class T>
NOT_INLINED vec<T> elu_gradient(vec<T> dy, vec<T> z, compute_t<T> alpha) {
    const vec<T> low = exponential<T>(below_zero<T>(z, Fit<T>::EXP_LIMIT)).value();
    return z > 0 ? dy : dy * alpha * low;
}

template <class T>
INLINE vec<T> hardswish(vec<T> z) {
    const vec<T> low = z <= -3 ? vec<T>{} : z * (z + 3) * broadcast<T>(1 / 6.0);
    return z >= 3 ? z : low;
}

template <class T>
INLINE vec<T> hardswish_derivative(vec<T> z) {
    const vec<T> low = z <= -3 ? vec<T>{} : z * broadcast<T>(1 / 3.0) + broadcast<T>(0.5);
    return z >= 3 ? broadcast<T>(1) : low;
}
