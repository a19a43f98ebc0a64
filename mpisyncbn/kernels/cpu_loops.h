// The inner loops of the four verbs. Included once per instruction set, after cpu_lanes.h: see cpu.cpp.
//
// Two ways to lie in memory. Planes: the positions of one channel of one sample side by side. Rows: the
// channels of one position side by side. What is done to a vector of values is the same in both, and
// written once (the structs with operator()); per-channel coefficients come from coefficient(MEAN) and the like, one
// value for a plane, one vector per column for rows.

// Sums. A vector of two terms per value, added up in the working dtype over short runs, in double beyond.

template <class T>
struct Moments {  // about an origin near the mean, so that the squares keep their digits
    static constexpr long rows_at_once = 8;  // see sum_rows
    template <class K, class A>
    INLINE_MEMBER void operator()(Pointers<T> pointers, long i, K coefficient, A access, vec<T> &a, vec<T> &b) const {
        a = access.get(pointers.x + i) - coefficient(MEAN);
        b = a * a;
    }
};

template <class T, Gate GATE>
struct Reduce {
    static constexpr long rows_at_once = 4;  // of two arrays each
    template <class K, class A>
    INLINE_MEMBER void operator()(Pointers<T> pointers, long i, K coefficient, A access, vec<T> &a, vec<T> &b) const {
        const vec<T> xm = access.get(pointers.x + i) - coefficient(MEAN);
        a = access.get(pointers.dy + i);
        if constexpr (GATE == Gate::recomputed) a = gated<T>(a, xm * coefficient(SCALE) + coefficient(SHIFT));
        if constexpr (GATE == Gate::saved) {
            a = gated<T>(a, access.get(pointers.extra + i));
            access.template put<false>(pointers.out + i, a);
        }
        b = a * xm;
    }
};

// Values.

template <class T, bool ADD, bool RELU>
struct Normalize {
    template <bool STREAM, class K, class A>
    INLINE_MEMBER void apply(Pointers<T> pointers, long i, K coefficient, A access) const {
        vec<T> z = (access.get(pointers.x + i) - coefficient(MEAN)) * coefficient(SCALE) + coefficient(SHIFT);
        if constexpr (ADD) z += access.get(pointers.extra + i);
        if constexpr (RELU) z = gated<T>(z, z);
        access.template put<STREAM>(pointers.out + i, z);
    }
};

template <class T, bool GATED>
struct Elementwise {
    template <bool STREAM, class K, class A>
    INLINE_MEMBER void apply(Pointers<T> pointers, long i, K coefficient, A access) const {
        const vec<T> xm = access.get(pointers.x + i) - coefficient(MEAN);
        vec<T> dy = access.get(pointers.dy + i);
        if constexpr (GATED) dy = gated<T>(dy, xm * coefficient(SCALE) + coefficient(SHIFT));
        access.template put<STREAM>(pointers.out + i, dy * coefficient(SCALE) + (xm * coefficient(SLOPE) + coefficient(INTERCEPT)));
    }
};

// One coefficient per channel, as one vector.
template <class T>
struct PlaneCoefficients {
    const compute_t<T> *coefficients;  // of this channel
    long stride;             // from one kind of coefficient to the next
    INLINE_MEMBER vec<T> operator()(int which) const { return broadcast<T>(coefficients[which * stride]); }
};

// Those of a channel in the first lanes, of the next one in the others.
template <class T>
struct TwoPlanesCoefficients {
    const compute_t<T> *coefficients;
    long stride, first;
    INLINE_MEMBER vec<T> operator()(int which) const {
        const compute_t<T> *both = coefficients + which * stride;
        return lanes_below<T>(first) ? broadcast<T>(both[0]) : broadcast<T>(both[1]);
    }
};

template <class T>
struct RowCoefficients {
    const compute_t<T> *coefficients;  // from this column on
    long stride;
    INLINE_MEMBER vec<T> operator()(int which) const { return read<vec<T>>(coefficients + which * stride); }
};

// Goes through planes that follow each other in memory, `planes` of `length` values each, in vectors that begin where
// vectors of `from` do: loads and stores that cross from one cache line into the next are slow, and stores past the
// cache need whole lines. Calls
//     inside(i, n, c): n vectors within plane c, from the i-th value on,
//     across(i, c, n): one vector, its first n values the last of plane c, the others of plane c + 1,
//     part(i, n, c): n values within plane c, fewer than a vector,
//     end(c): after the last value of plane c, if it was not in a vector across.
template <class T, class P, class Inside, class Across, class Piece, class End>
INLINE void go_through(const P *from, long planes, long length, Inside inside, Across across, Piece part, End end) {
    constexpr long W = Lane<T>::width;
    const long total = planes * length, ahead = (long)(-(uintptr_t)from % (W * sizeof(T)) / sizeof(T));
    long i = 0;
    if (length < 2 * W) {  // too short for two kinds of vectors
        for (long c = 0; c < planes; ++c, i += length) {
            if (length >= W) inside(i, 1, c);
            if (length % W) part(i + length / W * W, length % W, c);
            end(c);
        }
        return;
    }
    long c = 0, left = length;  // of plane c
    if (ahead) {
        part(0, ahead, 0);
        i = ahead, left -= ahead;
    }
    for (; i + W <= total; ++c) {
        const long n = left / W;
        if (n) inside(i, n, c);
        i += n * W, left -= n * W;
        if (left && i + W > total) break;
        if (left) {
            across(i, c, left);
            i += W, left += length - W;
        } else {
            end(c);
            left = length;
        }
    }
    if (i < total) {  // the end of the last plane
        part(i, total - i, c);
        end(c);
    }
}

template <class T>
struct PartialSums {
    vec<T> a, b;
};

// Adds both sums over n vectors, at most 64, to `into`: at most 16 additions in a lane.
template <class T, class F>
INLINE void add_vectors(Pointers<T> pointers, long n, PlaneCoefficients<T> k, F terms, PartialSums<T> &into) {
    constexpr long W = Lane<T>::width;
    vec<T> a0, a1, a2, a3, b0, b1, b2, b3, a, b;
    if (n >= 4) {
        terms(pointers, 0, k, FullAccess{}, a0, b0);
        terms(pointers, W, k, FullAccess{}, a1, b1);
        terms(pointers, 2 * W, k, FullAccess{}, a2, b2);
        terms(pointers, 3 * W, k, FullAccess{}, a3, b3);
        for (n -= 4, pointers = pointers + 4 * W; n >= 4; n -= 4, pointers = pointers + 4 * W) {
            terms(pointers, 0, k, FullAccess{}, a, b), a0 += a, b0 += b;
            terms(pointers, W, k, FullAccess{}, a, b), a1 += a, b1 += b;
            terms(pointers, 2 * W, k, FullAccess{}, a, b), a2 += a, b2 += b;
            terms(pointers, 3 * W, k, FullAccess{}, a, b), a3 += a, b3 += b;
        }
        into.a += (a0 + a1) + (a2 + a3);
        into.b += (b0 + b1) + (b2 + b3);
    }
    for (; n > 0; --n, pointers = pointers + W) {
        terms(pointers, 0, k, FullAccess{}, a, b);
        into.a += a, into.b += b;
    }
}

// Both sums for channels c0 to c1, at most MAX_CHANNELS of them, of the samples and positions of a tile.
template <class T, class F>
static void sum_planes(const Operands<T> &on, const Tile &t, const compute_t<T> *coefficients, long stride, F terms, double *first,
                       double *second) {
    constexpr long W = Lane<T>::width, BLOCK = 64, BLOCKS = 16;  // vectors; at most 16 additions in a lane, twice
    PartialSums<T> partial[MAX_CHANNELS];
    const long channels = t.c1 - t.c0, length = t.s1 - t.s0, together = on.adjacent(length) ? channels : 1;
    auto flush = [&](long c) {
        first[c] += total<T>(partial[c].a);
        second[c] += total<T>(partial[c].b);
        partial[c].a = partial[c].b = vec<T>{};
    };
    for (long c = 0; c < channels; ++c) partial[c].a = partial[c].b = vec<T>{};
    const long often = std::max(1L, BLOCKS * BLOCK * W / std::max(length, BLOCK * W));
    for (long n = t.n0; n < t.n1; ++n) {
        for (long from = 0; from < channels; from += together) {
            const Pointers<T> pointers = on.pointers_at(n, t.c0 + from, t.s0);
            PartialSums<T> *const into = partial + from;
            const compute_t<T> *const of_plane = coefficients + from;
            PartialSums<T> here{};  // in registers, for the plane at hand
            auto end = [&](long c) {
                into[c].a += here.a, into[c].b += here.b;
                here.a = here.b = vec<T>{};
            };
            go_through<T>(
                pointers.x, together, length,
                [&](long i, long vectors, long c) {
                    for (long done = 0, block = 1; done < vectors; done += BLOCK, ++block) {
                        add_vectors(pointers + (i + done * W), std::min(BLOCK, vectors - done), PlaneCoefficients<T>{of_plane + c, stride},
                                    terms, here);
                        if (block % BLOCKS == 0) {
                            end(c);
                            flush(from + c);
                        }
                    }
                },
                [&](long i, long c, long values) {
                    vec<T> a, b;
                    terms(pointers, i, TwoPlanesCoefficients<T>{of_plane + c, stride, values}, FullAccess{}, a, b);
                    here.a += only<T>(a, values), here.b += only<T>(b, values);
                    end(c);
                    here.a = from_lane<T>(a, values), here.b = from_lane<T>(b, values);
                },
                [&](long i, long values, long c) {
                    vec<T> a, b;
                    terms(pointers, i, PlaneCoefficients<T>{of_plane + c, stride}, TailAccess{values}, a, b);
                    here.a += only<T>(a, values), here.b += only<T>(b, values);
                },
                end);
        }
        if ((n - t.n0 + 1) % often == 0)
            for (long c = 0; c < channels; ++c) flush(c);
    }
    for (long c = 0; c < channels; ++c) flush(c);
}

// Adds the terms of one value each of PARTS rows, which lie `step` apart, to the sums of as many columns as a
// vector has.
template <long PARTS, class T, class F, class A>
INLINE void add_rows(Pointers<T> pointers, const typename Operands<T>::Strides &step, RowCoefficients<T> k, F terms, A access, compute_t<T> *a_sums,
                     compute_t<T> *b_sums) {
    vec<T> a[PARTS], b[PARTS];
#pragma GCC unroll 8
    for (long i = 0; i < PARTS; ++i) {
        terms(pointers, 0, k, access, a[i], b[i]);
        pointers = {pointers.dy + step.dy, pointers.x + step.x, pointers.extra + step.extra, pointers.out + step.out};
    }
#pragma GCC unroll 8
    for (long half = PARTS / 2; half; half /= 2)
#pragma GCC unroll 8
        for (long i = 0; i < half; ++i) a[i] += a[i + half], b[i] += b[i + half];
    write<false>(a_sums, read<vec<T>>(a_sums) + a[0]);
    write<false>(b_sums, read<vec<T>>(b_sums) + b[0]);
}

// Both sums for every column of rows s0 to s1. `scratch` holds two working vectors of the columns, padded to whole
// vectors; so does every kind of coefficient.
//
// Several rows are taken at a time, to load and store the sums less often: one from each part of the tile, not
// neighbours. Processors read ahead in several pages at once, but not in one page at several places.
template <class T, class F>
static void sum_rows(const Operands<T> &on, const Tile &t, const compute_t<T> *coefficients, long stride, F terms, compute_t<T> *scratch,
                     double *first, double *second) {
    constexpr long W = Lane<T>::width, DEPTH = 16, PARTS = F::rows_at_once;
    const long columns = t.c1 - t.c0, part = (t.s1 - t.s0) / PARTS;
    const auto &pitch = on.outer;
    const typename Operands<T>::Strides step = {part * pitch.dy, part * pitch.x, part * pitch.extra, part * pitch.out};
    compute_t<T> *const a_sums = scratch, *const b_sums = scratch + padded(columns);
    auto rows = [&](long from, long to, auto parts) {
        while (from < to) {
            std::fill(scratch, scratch + 2 * padded(columns), compute_t<T>(0));
            for (const long flush = std::min(from + DEPTH, to); from < flush; ++from) {
                const Pointers<T> pointers = on.pointers_at(from, t.c0, 0);
                long j = 0;
                for (; j + W <= columns; j += W)
                    add_rows<parts()>(pointers + j, step, RowCoefficients<T>{coefficients + j, stride}, terms, FullAccess{}, a_sums + j, b_sums + j);
                if (j < columns)
                    add_rows<parts()>(pointers + j, step, RowCoefficients<T>{coefficients + j, stride}, terms, TailAccess{columns - j}, a_sums + j,
                                      b_sums + j);
            }
            for (long j = 0; j < columns; ++j) first[j] += a_sums[j], second[j] += b_sums[j];
        }
    };
    rows(t.s0, t.s0 + part, std::integral_constant<long, PARTS>{});
    rows(t.s0 + part * PARTS, t.s1, std::integral_constant<long, 1>{});
}

template <bool STREAM, class T, class F>
static void pass_planes(const Operands<T> &on, const Tile &t, const compute_t<T> *coefficients, long stride, F operation) {
    constexpr long W = Lane<T>::width;
    const long channels = t.c1 - t.c0, length = t.s1 - t.s0, together = on.adjacent(length) ? channels : 1;
    if (STREAM && length < 2 * W) return pass_planes<false>(on, t, coefficients, stride, operation);  // not aligned there
    for (long n = t.n0; n < t.n1; ++n)
        for (long from = 0; from < channels; from += together) {
            const Pointers<T> pointers = on.pointers_at(n, t.c0 + from, t.s0);
            const compute_t<T> *const of_plane = coefficients + from;
            go_through<T>(
                pointers.out, together, length,
                [&](long i, long vectors, long c) {
                    const PlaneCoefficients<T> k{of_plane + c, stride};
                    for (; vectors >= 2; vectors -= 2, i += 2 * W) {
                        operation.template apply<STREAM>(pointers, i, k, FullAccess{});
                        operation.template apply<STREAM>(pointers, i + W, k, FullAccess{});
                    }
                    if (vectors) operation.template apply<STREAM>(pointers, i, k, FullAccess{});
                },
                [&](long i, long c, long values) {
                    operation.template apply<STREAM>(pointers, i, TwoPlanesCoefficients<T>{of_plane + c, stride, values}, FullAccess{});
                },
                [&](long i, long values, long c) {
                    operation.template apply<false>(pointers, i, PlaneCoefficients<T>{of_plane + c, stride}, TailAccess{values});
                },
                [](long) {});
        }
    if (STREAM) fence();
}

// Two rows at a time, one from each half of the tile: they share the coefficients of the channels, and see sum_rows.
template <bool STREAM, class T, class F>
static void pass_rows(const Operands<T> &on, const Tile &t, const compute_t<T> *coefficients, long stride, F operation) {
    constexpr long W = Lane<T>::width;
    const long columns = t.c1 - t.c0, half = (t.s1 - t.s0) / 2;
    for (long r = t.s0; r < t.s0 + half; ++r) {
        const Pointers<T> one = on.pointers_at(r, t.c0, 0), two = on.pointers_at(r + half, t.c0, 0);
        long j = 0;
        for (; j + W <= columns; j += W) {
            const RowCoefficients<T> k{coefficients + j, stride};
            operation.template apply<STREAM>(one, j, k, FullAccess{});
            operation.template apply<STREAM>(two, j, k, FullAccess{});
        }
        if (j < columns) {
            const RowCoefficients<T> k{coefficients + j, stride};
            operation.template apply<false>(one, j, k, TailAccess{columns - j});
            operation.template apply<false>(two, j, k, TailAccess{columns - j});
        }
    }
    if ((t.s1 - t.s0) % 2)
        for (long j = 0; j < columns; j += W)
            operation.template apply<false>(on.pointers_at(t.s1 - 1, t.c0, 0), j, RowCoefficients<T>{coefficients + j, stride},
                                    TailAccess{std::min(W, columns - j)});
    if (STREAM) fence();
}

// Both sums for each channel of a tile.
template <class T, class F>
static void tile_sums(const Operands<T> &on, const Tile &t, bool rows, const compute_t<T> *coefficients, long stride, F terms,
                      compute_t<T> *scratch, double *first, double *second) {
    std::fill(first, first + (t.c1 - t.c0), 0.0);
    std::fill(second, second + (t.c1 - t.c0), 0.0);
    if (rows)
        sum_rows(on, t, coefficients, stride, terms, scratch, first, second);
    else
        sum_planes(on, t, coefficients, stride, terms, first, second);
}

// A number near the mean of each channel, from a few values: of the first plane of a tile, or of rows spread over all.
template <class T>
static void plane_origins(const Operands<T> &on, const Tile &t, compute_t<T> *origins) {
    const long few = std::min(8L, t.s1 - t.s0);
    for (long c = t.c0; c < t.c1; ++c) {
        double sum = 0;
        for (long s = 0; s < few; ++s) sum += value(on.pointers_at(t.n0, c, t.s0 + s).x[0]);
        origins[c - t.c0] = (compute_t<T>)(sum / few);
    }
}

template <class T>
static void row_origins(const Operands<T> &on, long rows, long columns, compute_t<T> *origins) {
    constexpr long W = Lane<T>::width;
    long few = 8;  // a power of two, added up in pairs: the origin of a constant channel is its value
    while (few > rows) few /= 2;
    for (long j = 0; j < columns; j += W) {
        const TailAccess access{std::min(W, columns - j)};
        vec<T> sums[8];
        for (long i = 0; i < few; ++i) sums[i] = access.get(on.pointers_at(i * rows / few, j, 0).x) / (compute_t<T>)few;
        for (long half = few / 2; half; half /= 2)
            for (long i = 0; i < half; ++i) sums[i] += sums[i + half];
        write<false>(origins + j, sums[0]);
    }
}

// Whether a channel of a tile has one value only.
template <class T>
static bool is_constant(const Operands<T> &on, const Tile &t, bool rows, long c) {
    const long n0 = rows ? t.s0 : t.n0, n1 = rows ? t.s1 : t.n1, s0 = rows ? 0 : t.s0, s1 = rows ? 1 : t.s1;
    const auto first = value(on.pointers_at(n0, c, s0).x[0]);
    for (long n = n0; n < n1; ++n) {
        const T *const x = on.pointers_at(n, c, 0).x;
        for (long s = s0; s < s1; ++s)
            if (value(x[s]) != first) return false;
    }
    return true;
}

// For each channel of a tile: an origin near its mean, the sum of x - origin, and that of its square, or UNDERFLOWED. `origins`
// and `scratch` are padded to whole vectors.
template <class T>
static void tile_moments(const Operands<T> &on, const Tile &t, bool rows, long count, const compute_t<T> *given,
                         compute_t<T> *scratch, double *origin, double *first, double *second) {
    const long channels = t.c1 - t.c0;
    compute_t<T> *origins = scratch + 2 * padded(channels);
    if (rows)
        std::copy(given, given + padded(channels), origins);
    else
        plane_origins(on, t, origins);
    for (int turn = 0; turn < 2; ++turn) {
        if (std::fetestexcept(FE_UNDERFLOW)) std::feclearexcept(FE_UNDERFLOW);  // the second is slow
        tile_sums(on, t, rows, origins, 0, Moments<T>{}, scratch, first, second);
        for (long c = 0; c < channels; ++c) origin[c] = origins[c];
        // Where the origin is more than two standard deviations from the mean, the squares have lost digits: once
        // more, about the mean found. The other channels keep their origin, and get the same sums again.
        const auto lost = [&](long c) { return 1.25 * first[c] * first[c] > second[c] * count; };
        bool any = false;
        for (long c = 0; c < channels; ++c) any |= lost(c);
        if (!any) break;
        for (long c = 0; c < channels; ++c)
            if (lost(c) && std::isfinite(first[c])) origins[c] += (compute_t<T>)(first[c] / count);
    }
    if (sizeof(compute_t<T>) == 8 || std::is_same_v<T, float16>) return;
    // Squares that sum to 0 are those of a constant channel, unless one became 0: then the processor has set its flag.
    const bool underflow = std::fetestexcept(FE_UNDERFLOW);
    const auto unclear = [&](long c) {
        return (second[c] * count <= first[c] * first[c]) & (underflow | (second[c] > 0));
    };
    bool any = false;
    for (long c = 0; c < channels; ++c) any |= unclear(c);
    if (any)
        for (long c = 0; c < channels; ++c)
            if (unclear(c) && !is_constant(on, t, rows, t.c0 + c)) second[c] = UNDERFLOWED;
}

template <class T>
static void tile_reduce(const Operands<T> &on, const Tile &t, bool rows, Gate gate, const compute_t<T> *coefficients, long stride,
                        compute_t<T> *scratch, double *first, double *second) {
    auto sums = [&](auto terms) { tile_sums(on, t, rows, coefficients, stride, terms, scratch, first, second); };
    if (gate == Gate::none) sums(Reduce<T, Gate::none>{});
    if (gate == Gate::recomputed) sums(Reduce<T, Gate::recomputed>{});
    if (gate == Gate::saved) sums(Reduce<T, Gate::saved>{});
}

template <class T, class F>
static void tile_pass(const Operands<T> &on, const Tile &t, bool rows, bool stream, const compute_t<T> *coefficients, long stride,
                      F operation) {
    if (stream) streamed_values.fetch_add((t.c1 - t.c0) * t.count(), std::memory_order_relaxed);
    if (rows)
        stream ? pass_rows<true>(on, t, coefficients, stride, operation) : pass_rows<false>(on, t, coefficients, stride, operation);
    else
        stream ? pass_planes<true>(on, t, coefficients, stride, operation) : pass_planes<false>(on, t, coefficients, stride, operation);
}

template <class T>
static void tile_normalize(const Operands<T> &on, const Tile &t, bool rows, bool stream, const compute_t<T> *coefficients,
                           long stride, bool add, bool relu) {
    auto pass = [&](auto operation) { tile_pass(on, t, rows, stream, coefficients, stride, operation); };
    if (add)
        relu ? pass(Normalize<T, true, true>{}) : pass(Normalize<T, true, false>{});
    else
        relu ? pass(Normalize<T, false, true>{}) : pass(Normalize<T, false, false>{});
}

template <class T>
static void tile_elementwise(const Operands<T> &on, const Tile &t, bool rows, bool stream, const compute_t<T> *coefficients,
                             long stride, bool gated) {
    auto pass = [&](auto operation) { tile_pass(on, t, rows, stream, coefficients, stride, operation); };
    gated ? pass(Elementwise<T, true>{}) : pass(Elementwise<T, false>{});
}

template <class T>
static const Loops<T> loops = {row_origins<T>, tile_moments<T>, tile_reduce<T>, tile_normalize<T>, tile_elementwise<T>};
