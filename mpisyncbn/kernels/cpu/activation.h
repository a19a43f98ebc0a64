// The activations and their gradients, for a vector of values. Included once per instruction set by
// loops.h.
//
// To add an activation, add a case in each of the three functions below, and a name in types.h.

// v in the lanes where z is positive, else zero. NaN stays NaN, as in torch's ReLU.
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

// The gradient of the activation's input, from `dy`, the gradient of its output. `z` is the input,
// or the output if the input is not known.
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
