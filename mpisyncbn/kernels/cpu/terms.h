// The arithmetic on a vector of values. Included once per instruction set by loops.h.
//
// It is the same for planes and rows: coefficient(MEAN) and the like give the coefficients of a
// plane's channel in all lanes, or those of the columns of rows in one lane each.

// Sets values that do not count to 0 in the terms, and in the output. It clears their bits, because 0
// times NaN is not 0.
template <class T, bool MASKED>
struct Kept {
    typename Lane<T>::mask mask;
    template <class K>
    INLINE_MEMBER Kept(Pointers<T> pointers, long i, K coefficient) {
        if constexpr (MASKED) mask = coefficient.mask(pointers, i);
    }
    INLINE_MEMBER vec<T> operator()(vec<T> v) const {
        if constexpr (MASKED) return (vec<T>)((typename Lane<T>::mask)v & mask);
        return v;
    }
};

// Terms of sums: a vector for the sum a, and a factor: a * factor is for the sum b. Short runs of them
// are added in compute_t<T>, and the sums of runs in double.

template <class T, bool MASKED>
struct Moments {  // MEAN is an origin near the mean, so that the squares keep their digits
    static constexpr long rows_at_once = 8;  // see sum_rows
    template <class K, class A>
    INLINE_MEMBER void operator()(Pointers<T> pointers, long i, K coefficient, A access, vec<T> &a,
                                  vec<T> &factor) const {
        const Kept<T, MASKED> kept(pointers, i, coefficient);
        a = factor = kept(access.get(pointers.x + i) - coefficient(MEAN));
    }
};

// The x of the formulas: `x` itself or, if that is the output of a leaky ReLU, the input of it.
template <class T, class HOW>
INLINE vec<T> input_of(HOW how, vec<T> x) {
    return how.undone() ? (x > 0 ? x : x * broadcast<T>(1 / how.parameter)) : x;
}

// Fetches what a loop will read half a page later. Processors do so by themselves, but not into the
// next page, and a loop with much arithmetic does not get there early enough.
INLINE void read_ahead(const void *from) { __builtin_prefetch((const char *)from + 2048); }

template <class T, class HOW>
struct Reduce {
    HOW how;
    bool stores;  // whether a Chosen stores the input's gradient; a Fixed does if its source is not x
    static constexpr long rows_at_once = 4;  // fewer, because it reads two arrays
    template <class K, class A>
    INLINE_MEMBER void operator()(Pointers<T> pointers, long i, K coefficient, A access, vec<T> &a,
                                  vec<T> &factor) const {
        if constexpr (HOW::chosen) read_ahead(pointers.x + i), read_ahead(pointers.dy + i);
        const Kept<T, HOW::masked> kept(pointers, i, coefficient);
        const vec<T> x = access.get(pointers.x + i), xm = kept(input_of<T>(how, x) - coefficient(MEAN));
        a = access.get(pointers.dy + i);
        if (how.undone()) {
            a = activation_gradient<T>(how, a, x);
        } else if (how.kind != Kind::none) {
            vec<T> z = how.source == Source::x ? vec<T>{} : access.get(pointers.extra + i);
            if (how.source != Source::output) z += xm * coefficient(SCALE) + coefficient(SHIFT);
            a = activation_gradient<T>(how, a, z);
        }
        a = kept(a);
        if (HOW::chosen ? stores : !how.undone() && how.source != Source::x) {
            access.template put<false>(pointers.out + i, a);
            // The sums are those of the stored values, so that the mean of dx is 0 even after rounding.
            a = rounded<T>(a);
        }
        factor = xm;
    }
};

// Passes over values.

template <class T, class HOW>
struct Normalize {
    HOW how;
    template <bool STREAM, class K, class A>
    INLINE_MEMBER void apply(Pointers<T> pointers, long i, K coefficient, A access) const {
        if constexpr (HOW::chosen) read_ahead(pointers.x + i);
        vec<T> z = (access.get(pointers.x + i) - coefficient(MEAN)) * coefficient(SCALE) + coefficient(SHIFT);
        if (how.source == Source::residual) z += access.get(pointers.extra + i);
        const Kept<T, HOW::masked> kept(pointers, i, coefficient);
        access.template put<STREAM>(pointers.out + i, kept(activate<T>(how, z)));
    }
};

// dy is still the gradient of the activation's output.
template <class T, class HOW>
struct Elementwise {
    HOW how;
    template <bool STREAM, class K, class A>
    INLINE_MEMBER void apply(Pointers<T> pointers, long i, K coefficient, A access) const {
        const vec<T> x = access.get(pointers.x + i), xm = input_of<T>(how, x) - coefficient(MEAN);
        vec<T> dy = access.get(pointers.dy + i);
        if (how.kind != Kind::none)
            dy = activation_gradient<T>(
                how, dy, how.undone() ? x : xm * coefficient(SCALE) + coefficient(SHIFT));
        const Kept<T, HOW::masked> kept(pointers, i, coefficient);
        const vec<T> dx = dy * coefficient(SCALE) + (xm * coefficient(SLOPE) + coefficient(INTERCEPT));
        access.template put<STREAM>(pointers.out + i, kept(dx));
    }
};

// One coefficient per channel, as one vector.
template <class T>
struct PlaneCoefficients {
    const compute_t<T> *coefficients;  // of this channel
    long stride;                       // from one kind of coefficient to the next
    INLINE_MEMBER vec<T> operator()(int which) const { return broadcast<T>(coefficients[which * stride]); }
    INLINE_MEMBER auto mask(Pointers<T> pointers, long i) const {
        return mask_of_bytes<T>(pointers.mask + i);
    }
};

// The coefficients of a channel in the first lanes, and those of the next channel in the others.
template <class T>
struct TwoPlanesCoefficients {
    const compute_t<T> *coefficients;
    long stride, first;
    INLINE_MEMBER vec<T> operator()(int which) const {
        const compute_t<T> *both = coefficients + which * stride;
        return lanes_below<T>(first) ? broadcast<T>(both[0]) : broadcast<T>(both[1]);
    }
    // the mask of a sample is followed by its own beginning
    INLINE_MEMBER auto mask(Pointers<T> pointers, long i) const {
        return mask_of_bytes<T>(pointers.mask + i);
    }
};

// The coefficients of as many channels as a vector has lanes.
template <class T>
struct RowCoefficients {
    const compute_t<T> *coefficients;  // from this column on
    long stride;
    const uint8_t *row_of_column;  // from this column on; null unless a mask is of rows taken together
    INLINE_MEMBER vec<T> operator()(int which) const { return read<vec<T>>(coefficients + which * stride); }
    INLINE_MEMBER auto mask(Pointers<T> pointers, long) const {
        if (row_of_column) return gathered_mask<T>(pointers.mask, row_of_column);
        return typename Lane<T>::mask{} - (*pointers.mask != 0);
    }
};
