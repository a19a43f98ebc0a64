// The activations and their gradients, for a vector of values. Included once per instruction set by
// loops.h.
//
// Another activation is one more case in each of the three functions, and one more name in
// types.h.

// v, and zero where z is not positive. NaN passes, as it does through torch's ReLU.
template <class T>
INLINE vec<T> where_positive(vec<T> v, vec<T> z) {
    using M = typename Lane<T>::mask;
    return (vec<T>)((M)v & ~(M)(z <= 0));
}

template <Activation ACTIVATION, class T>
INLINE vec<T> activate(vec<T> z) {
    if constexpr (ACTIVATION == Activation::relu) return where_positive<T>(z, z);
    return z;
}

// The gradient of what goes into the activation. `z` is what goes in or, where that is not known,
// what comes out.
template <Activation ACTIVATION, class T>
INLINE vec<T> activation_gradient(vec<T> dy, vec<T> z) {
    if constexpr (ACTIVATION == Activation::relu) return where_positive<T>(dy, z);
    return dy;
}

// Calls `call` with the activation as a constant.
template <class F>
INLINE void by_activation(Activation activation, F call) {
    switch (activation) {
        case Activation::relu: return call(std::integral_constant<Activation, Activation::relu>{});
        default: return call(std::integral_constant<Activation, Activation::none>{});
    }
}
