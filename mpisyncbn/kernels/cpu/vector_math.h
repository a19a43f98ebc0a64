// Activations that need more than comparisons, and their derivatives, for a vector of values.
// Included once per instruction set by activation.h.
//
// These functions are not inlined: a loop has several copies of its body, and they are long.

#define NOT_INLINED static __attribute__((noinline))

template <class T, class F>
INLINE vec<T> by_lane(vec<T> z, F function) {
    for (int i = 0; i < Lane<T>::width; ++i) z[i] = function(z[i]);
    return z;
}

template <class T>
INLINE vec<T> sigmoid(vec<T> z) {
    return 1 / (1 + by_lane<T>(-z, [](auto v) { return std::exp(v); }));
}

template <class T>
NOT_INLINED vec<T> silu(vec<T> z) {
    return z * sigmoid<T>(z);
}

template <class T>
NOT_INLINED vec<T> silu_derivative(vec<T> z) {
    const vec<T> s = sigmoid<T>(z);
    return s * (1 + z * (1 - s));
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

template <class T>
NOT_INLINED vec<T> elu(vec<T> z, double alpha) {
    return z > 0 ? z : by_lane<T>(z, [&](auto v) { return std::expm1(v); }) * broadcast<T>(alpha);
}

template <class T>
NOT_INLINED vec<T> elu_derivative(vec<T> z, double alpha) {
    return z > 0 ? broadcast<T>(1) : by_lane<T>(z, [&](auto v) { return std::exp(v); }) * broadcast<T>(alpha);
}

template <class T>
NOT_INLINED vec<T> gelu(vec<T> z) {
    return by_lane<T>(z, [](double v) { return v * std::erfc(-v * std::sqrt(0.5)) / 2; });
}

template <class T>
NOT_INLINED vec<T> gelu_derivative(vec<T> z) {
    return by_lane<T>(z, [](double v) {
        return std::erfc(-v * std::sqrt(0.5)) / 2 + v * std::exp(-v * v / 2) * std::sqrt(0.5 / 3.14159265358979323846);
    });
}

template <class T>
NOT_INLINED vec<T> gelu_tanh(vec<T> z) {
    const double scale = std::sqrt(2 / 3.14159265358979323846);
    return by_lane<T>(z, [&](double v) { return v * (1 + std::tanh(scale * (v + 0.044715 * v * v * v))) / 2; });
}

template <class T>
NOT_INLINED vec<T> gelu_tanh_derivative(vec<T> z) {
    const double scale = std::sqrt(2 / 3.14159265358979323846);
    return by_lane<T>(z, [&](double v) {
        const double t = std::tanh(scale * (v + 0.044715 * v * v * v));
        return (1 + t) / 2 + v * (1 - t * t) * scale * (1 + 3 * 0.044715 * v * v) / 2;
    });
}
