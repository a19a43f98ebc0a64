// The activations and their gradients, for a vector of values. Included once per instruction set by
// loops.h.
//
// To add an activation, add a case in each of the two switches below, and a name in types.h.

#include "vector_math.h"

// v in the lanes where z is positive, else zero. NaN stays NaN, as in torch's ReLU.
template <class T>
INLINE vec<T> where_positive(vec<T> v, vec<T> z) {
    using M = typename Lane<T>::mask;
    return (vec<T>)((M)v & ~(M)(z <= 0));
}

// The output of an activation. HOW is Fixed or Chosen, see below.
template <class T, class HOW>
INLINE vec<T> activate(HOW how, vec<T> z) {
    using F = fit_t<T>;
    switch (how.kind) {
        case Kind::none: return z;
        case Kind::relu: return where_positive<T>(z, z);
        case Kind::leaky_relu: return z > 0 ? z : z * broadcast<T>(how.parameter);
        case Kind::silu: return gated<Kind::silu, F>(z);
        case Kind::hardswish: return hardswish<F>(z);
        case Kind::elu: return elu<F>(z, how.parameter);
        case Kind::gelu: return gated<Kind::gelu, F>(z);
        case Kind::gelu_tanh: return gated<Kind::gelu_tanh, F>(z);
    }
    return z;
}

// The gradient of the activation's input z, from `dy`, the gradient of its output. `z` may be the
// output if its sign determines the derivative.
template <class T, class HOW>
INLINE vec<T> activation_gradient(HOW how, vec<T> dy, vec<T> z) {
    using F = fit_t<T>;
    switch (how.kind) {
        case Kind::none: return dy;
        case Kind::relu: return where_positive<T>(dy, z);
        case Kind::leaky_relu: return z > 0 ? dy : dy * broadcast<T>(how.parameter);
        case Kind::silu: return dy * gated_derivative<Kind::silu, F>(z);
        case Kind::hardswish: return dy * hardswish_derivative<F>(z);
        case Kind::elu: return elu_gradient<F>(dy, z, how.parameter);
        case Kind::gelu: return dy * gated_derivative<Kind::gelu, F>(z);
        case Kind::gelu_tanh: return dy * gated_derivative<Kind::gelu_tanh, F>(z);
    }
    return dy;
}

// The activation of a loop as constants for the compiler. `source` says where the activation's input
// comes from.
template <Kind KIND, Source SOURCE>
struct Fixed {
    static constexpr bool chosen = false;
    static constexpr Kind kind = KIND;
    static constexpr Source source = SOURCE;
    static constexpr double parameter = 0;
    static constexpr bool masked = false;
    static constexpr bool undone() { return false; }
};

// The same as values at run time, for cases that are not worth compiled code of their own.
template <bool MASKED>
struct Chosen {
    static constexpr bool chosen = true;
    static constexpr bool masked = MASKED;
    Kind kind;
    Source source;
    double parameter;
    INLINE_MEMBER bool undone() const { return MASKED && source == Source::undone; }
};

// A leaky ReLU whose output is given in place of x, without a mask.
struct Undone {
    static constexpr bool chosen = false;
    static constexpr bool masked = false;
    static constexpr Kind kind = Kind::leaky_relu;
    static constexpr Source source = Source::undone;
    double parameter;
    static constexpr bool undone() { return true; }
};

// Calls `call` with a Fixed, whose source is x or OTHER, or with a Chosen, or, unless OTHER is
// residual, with an Undone.
template <Source OTHER, class F>
INLINE void by_case(Activation activation, Source source, bool masked, F call) {
    if (masked) return call(Chosen<true>{activation.kind, source, activation.parameter});
    if (activation.kind == Kind::relu && source == OTHER) return call(Fixed<Kind::relu, OTHER>{});
    if (activation.kind == Kind::relu && source == Source::x) return call(Fixed<Kind::relu, Source::x>{});
    if (activation.kind == Kind::none && source == Source::x) return call(Fixed<Kind::none, Source::x>{});
    if constexpr (OTHER == Source::residual) {
        if (activation.kind == Kind::none) return call(Fixed<Kind::none, OTHER>{});
    } else if (source == Source::undone) {
        return call(Undone{activation.parameter});
    }
    call(Chosen<false>{activation.kind, source, activation.parameter});
}
