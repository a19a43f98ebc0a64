// Vectors of LANES floats (or LANES / 2 doubles), and their loads and stores for values of each
// dtype.
//
// Included once per instruction set, inside a namespace of its own: see levels.h. The code uses the
// vector extensions that gcc and clang share, so that the same lines serve every instruction set.
// It uses intrinsics only for half precision and for stores past the cache, which those extensions
// lack or for which gcc makes poor code.

template <class T>
struct Lane {  // float, and dtypes whose arithmetic is in float
    static constexpr int width = LANES;
    typedef float vec __attribute__((vector_size(LANES * 4)));
    typedef int32_t mask __attribute__((vector_size(LANES * 4)));
    typedef uint32_t bits __attribute__((vector_size(LANES * 4)));
    typedef uint16_t half_bits __attribute__((vector_size(LANES * 2)));
};

template <>
struct Lane<double> {
    static constexpr int width = LANES / 2;
    typedef double vec __attribute__((vector_size(LANES * 4)));
    typedef int64_t mask __attribute__((vector_size(LANES * 4)));
};

template <class T>
using vec = typename Lane<T>::vec;

template <class V, class P>
INLINE V read(const P *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// With STREAM, writes past the cache (a non-temporal store), which then need not fetch the old values
// from memory.
template <bool STREAM, class V, class P>
INLINE void write(P *p, V v) {
#if defined(__x86_64__)
    if constexpr (STREAM && sizeof v == 16) return _mm_stream_si128((__m128i *)p, (__m128i)v);
#if LANES >= 8
    if constexpr (STREAM && sizeof v == 32) return _mm256_stream_si256((__m256i *)p, (__m256i)v);
#endif
#if LANES >= 16
    if constexpr (STREAM && sizeof v == 64) return _mm512_stream_si512((__m512i *)p, (__m512i)v);
#endif
#endif
    __builtin_memcpy(p, &v, sizeof v);
}

// Conversions from 16 to 32 bits and back. gcc's own conversion takes more instructions.
INLINE Lane<float>::bits widened(Lane<float>::half_bits v) {
#if LANES == 16
    return (Lane<float>::bits)_mm512_cvtepu16_epi32((__m256i)v);
#elif LANES == 8
    return (Lane<float>::bits)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, Lane<float>::bits);
#endif
}

INLINE Lane<float>::half_bits narrowed(Lane<float>::bits v) {
#if LANES == 16
    return (Lane<float>::half_bits)_mm512_cvtepi32_epi16((__m512i)v);
#elif LANES == 8
    const __m256i pairs = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    return (Lane<float>::half_bits)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
    return __builtin_convertvector(v, Lane<float>::half_bits);
#endif
}

// The values of 16 bits as float, and back, rounded to nearest, ties to even.
template <class T>
struct Half;

template <>
struct Half<bfloat16> {
    using L = Lane<bfloat16>;
    static INLINE_MEMBER L::vec wide(L::half_bits raw) { return (L::vec)(widened(raw) << 16); }
    static INLINE_MEMBER L::half_bits narrow(L::vec v) {
#ifdef BF16_INSTRUCTIONS  // they take subnormal numbers, below 1e-38, for zero
        return (L::half_bits)_mm512_cvtneps_pbh((__m512)v);
#else
        auto b = (L::bits)v;
        auto rounded = b + 0x7fff + ((b >> 16) & 1);
        auto nan = (L::bits)(v != v);
        return narrowed(((rounded & ~nan) | (nan & 0x7fc00000)) >> 16);
#endif
    }
};

template <>
struct Half<float16> {
    using L = Lane<float16>;
    static INLINE_MEMBER L::vec wide(L::half_bits raw) {
#if LANES == 16
        return (L::vec)_mm512_cvtph_ps((__m256i)raw);
#elif LANES == 8
        return (L::vec)_mm256_cvtph_ps((__m128i)raw);
#else
        auto h = widened(raw);
        auto magnitude = h & 0x7fff;
        // A shift moves the exponent, and a multiplication corrects it, also for subnormal numbers.
        auto f = (L::bits)((L::vec)(magnitude << 13) * 0x1p112f);
        f |= (L::bits)(magnitude > 0x7bff) & 0x7f800000;  // infinity and NaN
        return (L::vec)(f | ((h & 0x8000) << 16));
#endif
    }
    static INLINE_MEMBER L::half_bits narrow(L::vec v) {
#if LANES == 16
        return (L::half_bits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif LANES == 8
        return (L::half_bits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
        auto b = (L::bits)v;
        auto sign = (b >> 16) & 0x8000;
        b &= 0x7fffffff;
        // Subnormal halves: adding 0.5 leaves the rounded mantissa in the low bits.
        auto tiny = (L::bits)((L::vec)b + 0.5f) - 0x3f000000;
        auto normal = (b - 0x38000000 + 0xfff + ((b >> 13) & 1)) >> 13;
        auto small = (L::bits)(b < 0x38800000);
        auto h = (tiny & small) | (normal & ~small);
        auto large = (L::bits)(b >= 0x47800000);
        auto nan = (L::bits)(b > 0x7f800000);
        h = (h & ~large) | (large & 0x7c00) | (nan & 0x7e00);
        return narrowed(h | sign);
#endif
    }
};

template <class T>
INLINE vec<T> load(const T *p) {
    if constexpr (sizeof(T) == 2)
        return Half<T>::wide(read<typename Lane<T>::half_bits>(p));
    else
        return read<vec<T>>(p);
}

template <bool STREAM, class T>
INLINE void store(T *p, vec<T> v) {
    if constexpr (sizeof(T) == 2)
        write<STREAM>(p, Half<T>::narrow(v));
    else
        write<STREAM>(p, v);
}

// The values that store() leaves in memory.
template <class T>
INLINE vec<T> rounded(vec<T> v) {
    if constexpr (sizeof(T) == 2) return Half<T>::wide(Half<T>::narrow(v));
    return v;
}

// Loads n values, fewer than a vector has. The other lanes are zero.
template <class T>
INLINE vec<T> load_part(const T *p, long n) {
#if LANES == 16
    const unsigned lanes = (1u << n) - 1;
    if constexpr (sizeof(T) == 8) return (vec<T>)_mm512_maskz_loadu_pd(lanes, p);
    if constexpr (sizeof(T) == 4) return (vec<T>)_mm512_maskz_loadu_ps(lanes, p);
    if constexpr (sizeof(T) == 2) {
        T padded[16];
        _mm256_storeu_si256((__m256i *)padded, _mm256_maskz_loadu_epi16(lanes, p));
        return load(padded);
    }
#else
    T padded[Lane<T>::width] = {};
    for (long i = 0; i < n; ++i) padded[i] = p[i];
    return load(padded);
#endif
}

template <class T>
INLINE void store_part(T *p, vec<T> v, long n) {
#if LANES == 16
    const unsigned lanes = (1u << n) - 1;
    if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, lanes, (__m512d)v);
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, lanes, (__m512)v);
    if constexpr (sizeof(T) == 2) {
        T padded[16];
        store<false>(padded, v);
        _mm256_mask_storeu_epi16(p, lanes, _mm256_loadu_si256((__m256i *)padded));
    }
#else
    T padded[Lane<T>::width];
    store<false>(padded, v);
    for (long i = 0; i < n; ++i) p[i] = padded[i];
#endif
}

// A loop accesses memory by whole vectors, and by a part of one at the end of a run.
struct FullAccess {
    template <class T>
    INLINE_MEMBER vec<T> get(const T *p) const {
        return load(p);
    }
    template <bool STREAM, class T>
    INLINE_MEMBER void put(T *p, vec<T> v) const {
        store<STREAM>(p, v);
    }
};

struct TailAccess {
    long n;
    template <class T>
    INLINE_MEMBER vec<T> get(const T *p) const {
        return load_part(p, n);
    }
    template <bool STREAM, class T>
    INLINE_MEMBER void put(T *p, vec<T> v) const {
        store_part<T>(p, v, n);
    }
};

template <class T>
INLINE vec<T> broadcast(compute_t<T> value) {
    return value - vec<T>{};  // + would cost an instruction, because -0 + 0 is not -0
}

// The larger one of each lane, or b where one is NaN. gcc makes three instructions of a > b ? a : b.
INLINE vec<float> larger(vec<float> a, vec<float> b) {
#if LANES == 16
    return (vec<float>)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
#elif LANES == 8
    return (vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

INLINE vec<double> larger(vec<double> a, vec<double> b) {
#if LANES == 16
    return (vec<double>)_mm512_maskz_max_pd(-1, (__m512d)a, (__m512d)b);
#elif LANES == 8
    return (vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    return a > b ? a : b;
#endif
}

// A mask of the first n lanes.
template <class T>
INLINE typename Lane<T>::mask lanes_below(long n) {
    using E = std::conditional_t<sizeof(compute_t<T>) == 8, int64_t, int32_t>;
    typename Lane<T>::mask lane = {};
    for (int i = 0; i < Lane<T>::width; ++i) lane[i] = i;
    return lane < (E)n;
}

// v in the first n lanes, zero in the others.
template <class T>
INLINE vec<T> only(vec<T> v, long n) {
    return lanes_below<T>(n) ? v : vec<T>{};
}

// A mask of the lanes whose bytes are not 0.
template <class T>
INLINE typename Lane<T>::mask mask_of_bytes(const int8_t *p) {
    using M = typename Lane<T>::mask;
#if LANES == 16
    if constexpr (Lane<T>::width == 16)
        return (M)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)) != 0;
    return (M)_mm512_cvtepi8_epi64(_mm_loadl_epi64((const __m128i *)p)) != 0;
#elif LANES == 8
    if constexpr (Lane<T>::width == 8)
        return (M)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)) != 0;
    return (M)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(read<int>(p))) != 0;
#else
    M mask;
    for (int i = 0; i < Lane<T>::width; ++i) mask[i] = p[i];
    return mask != 0;
#endif
}

// The same, for lanes whose bytes are at p + which[i]. Lanes of a vector lie less than 16 bytes apart.
template <class T>
INLINE typename Lane<T>::mask gathered_mask(const int8_t *p, const uint8_t *which) {
    int8_t bytes[16];
#if LANES >= 8
    const __m128i from_first = _mm_sub_epi8(_mm_loadu_si128((const __m128i *)which), _mm_set1_epi8(which[0]));
    const __m128i found = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p + which[0])), from_first);
    _mm_storeu_si128((__m128i *)bytes, found);
#else
    for (int i = 0; i < Lane<T>::width; ++i) bytes[i] = p[which[i]];
#endif
    return mask_of_bytes<T>(bytes);
}

template <class T>
INLINE vec<T> from_lane(vec<T> v, long n) {
    return lanes_below<T>(n) ? vec<T>{} : v;
}

template <class T>
NOT_INLINED double total(vec<T> v) {
    if constexpr (Lane<T>::width == 2) return v[0] + v[1];
    // adds the halves in double
    constexpr int HALF = Lane<T>::width / 2;
    typedef compute_t<T> part __attribute__((vector_size(sizeof v / 2)));
    typedef double wide __attribute__((vector_size(HALF * 8)));
    part low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, (const char *)&v + sizeof low, sizeof high);
    const wide both = __builtin_convertvector(low, wide) + __builtin_convertvector(high, wide);
    double values[HALF], sum = 0;
    __builtin_memcpy(values, &both, sizeof both);
    for (int i = 0; i < HALF; ++i) sum += values[i];
    return sum;
}
