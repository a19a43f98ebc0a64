// Two sums per channel of a tile. Included once per instruction set by loops.h.
//
// Values are added up in compute_t<T> over short runs, and in double beyond.

constexpr long BLOCK = 64, BLOCKS = 16;  // vectors of a plane: at most 16 additions in a lane, twice

template <class T>
struct PartialSums {
    vec<T> a, b;
};

// The terms of n values, fewer than a vector.
template <class T, class F, class K>
NOT_INLINED void part_terms(Pointers<T> pointers, long i, K coefficient, F terms, long n, vec<T> &a,
                            vec<T> &factor) {
    terms(pointers, i, coefficient, TailAccess{n}, a, factor);
}

// Adds both sums over n vectors, at most 64, to `into`. A lane has at most 16 additions.
template <class T, class F>
INLINE void add_vectors(Pointers<T> pointers, long n, PlaneCoefficients<T> coefficient, F terms,
                        PartialSums<T> &into) {
    constexpr long W = Lane<T>::width;
    vec<T> a0{}, a1{}, a2{}, a3{}, b0{}, b1{}, b2{}, b3{}, a, factor;
    if (n >= 4) {
        for (; n >= 4; n -= 4, pointers = pointers + 4 * W) {
            terms(pointers, 0, coefficient, FullAccess{}, a, factor), a0 += a, b0 += a * factor;
            terms(pointers, W, coefficient, FullAccess{}, a, factor), a1 += a, b1 += a * factor;
            terms(pointers, 2 * W, coefficient, FullAccess{}, a, factor), a2 += a, b2 += a * factor;
            terms(pointers, 3 * W, coefficient, FullAccess{}, a, factor), a3 += a, b3 += a * factor;
        }
        into.a += (a0 + a1) + (a2 + a3);
        into.b += (b0 + b1) + (b2 + b3);
    }
    for (; n > 0; --n, pointers = pointers + W) {
        terms(pointers, 0, coefficient, FullAccess{}, a, factor);
        into.a += a, into.b += a * factor;
    }
}

// Adds both sums over planes that follow each other in memory to `partial`, which has an entry for
// each plane. Calls flush(c) before the partial sums of plane c have so many terms that they lose
// digits.
template <class T, class F, class Flush>
INLINE void add_planes(Pointers<T> pointers, long planes, long length, const compute_t<T> *coefficients,
                       long stride, F terms, PartialSums<T> *partial, Flush flush) {
    constexpr long W = Lane<T>::width;
    PartialSums<T> here{};  // in registers, for the plane at hand
    vec<T> a, factor;
    auto end = [&](long c) {
        partial[c].a += here.a, partial[c].b += here.b;
        here.a = here.b = vec<T>{};
    };
    if (length < 2 * W) {
        for (long c = 0; c < planes; ++c, pointers = pointers.after(length) + length) {
            const PlaneCoefficients<T> coefficient{coefficients + c, stride};
            if (length >= W) {
                terms(pointers, 0, coefficient, FullAccess{}, a, factor);
                here.a += a, here.b += a * factor;
            }
            if (const long left = length % W) {
                terms(pointers, length - left, coefficient, TailAccess{left}, a, factor);
                here.a += only<T>(a, left), here.b += only<T>(a * factor, left);
            }
            end(c);
        }
        return;
    }
    go_through<T>(
        pointers.x, planes, length,
        [&](long i, long vectors, long c) {
            for (long done = 0, block = 1; done < vectors; done += BLOCK, ++block) {
                const PlaneCoefficients<T> coefficient{coefficients + c, stride};
                add_vectors(pointers.after(c * length) + (i + done * W), std::min(BLOCK, vectors - done),
                            coefficient, terms, here);
                if (block % BLOCKS == 0) {
                    end(c);
                    flush(c);
                }
            }
        },
        [&](long i, long c, long values) {
            const TwoPlanesCoefficients<T> coefficient{coefficients + c, stride, values};
            vec<T> a, factor;
            terms(pointers.after(c * length), i, coefficient, FullAccess{}, a, factor);
            const vec<T> b = a * factor;
            here.a += only<T>(a, values), here.b += only<T>(b, values);
            end(c);
            here.a = from_lane<T>(a, values), here.b = from_lane<T>(b, values);
        },
        [&](long i, long values, long c) {
            const PlaneCoefficients<T> coefficient{coefficients + c, stride};
            vec<T> a, factor;
            part_terms(pointers.after(c * length), i, coefficient, terms, values, a, factor);
            here.a += only<T>(a, values), here.b += only<T>(a * factor, values);
        },
        end);
}

// Adds both sums over a tile of planes to the totals of channels c0 to c1, at most MAX_CHANNELS.
template <class T, class F>
static void sum_planes(const Operands<T> &on, const Tile &t, const compute_t<T> *coefficients, long stride,
                       F terms, double *total_a, double *total_b) {
    constexpr long W = Lane<T>::width;
    PartialSums<T> partial[MAX_CHANNELS];
    const long channels = t.c1 - t.c0, length = t.s1 - t.s0, together = on.adjacent(length) ? channels : 1;
    auto flush = [&](long c) {
        total_a[c] += total<T>(partial[c].a);
        total_b[c] += total<T>(partial[c].b);
        partial[c].a = partial[c].b = vec<T>{};
    };
    for (long c = 0; c < channels; ++c) partial[c].a = partial[c].b = vec<T>{};
    const long often = std::max(1L, BLOCKS * BLOCK * W / std::max(length, BLOCK * W));
    for (long n = t.n0; n < t.n1; ++n) {
        for (long from = 0; from < channels; from += together)
            add_planes(on.pointers_at(n, t.c0 + from, t.s0), together, length, coefficients + from, stride,
                       terms, partial + from, [&](long c) { flush(from + c); });
        if ((n - t.n0 + 1) % often == 0)
            for (long c = 0; c < channels; ++c) flush(c);
    }
    for (long c = 0; c < channels; ++c) flush(c);
}

// The coefficients of a tile's columns from the j-th on.
template <class T>
INLINE RowCoefficients<T> row_coefficients(const Operands<T> &on, const Tile &t,
                                           const compute_t<T> *coefficients, long stride, long j) {
    return {coefficients + j, stride, on.row_of_column ? on.row_of_column + t.c0 + j : nullptr};
}

// Adds the terms of ROWS rows, which lie `step` apart, to the sums of one vector of columns, or of
// the last n columns.
template <long ROWS, bool WHOLE, class T, class F>
INLINE void add_rows(Pointers<T> pointers, const typename Operands<T>::Strides &step,
                     RowCoefficients<T> coefficient, F terms, long n, compute_t<T> *a_sums,
                     compute_t<T> *b_sums) {
    vec<T> a[ROWS], b[ROWS];
#pragma GCC unroll 8
    for (long i = 0; i < ROWS; ++i) {
        vec<T> factor;
        if constexpr (WHOLE)
            terms(pointers, 0, coefficient, FullAccess{}, a[i], factor);
        else
            part_terms(pointers, 0, coefficient, terms, n, a[i], factor);
        b[i] = a[i] * factor;
        pointers = {pointers.dy + step.dy, pointers.x + step.x, pointers.extra + step.extra,
                    pointers.out + step.out, pointers.mask + step.mask};
    }
#pragma GCC unroll 8
    for (long half = ROWS / 2; half; half /= 2)
#pragma GCC unroll 8
        for (long i = 0; i < half; ++i) a[i] += a[i + half], b[i] += b[i + half];
    write<false>(a_sums, read<vec<T>>(a_sums) + a[0]);
    write<false>(b_sums, read<vec<T>>(b_sums) + b[0]);
}

// The same for the last n columns, fewer than a vector.
template <long ROWS, class T, class F>
NOT_INLINED void add_row_ends(Pointers<T> pointers, const typename Operands<T>::Strides &step,
                              RowCoefficients<T> coefficient, F terms, long n, compute_t<T> *a_sums,
                              compute_t<T> *b_sums) {
    add_rows<ROWS, false>(pointers, step, coefficient, terms, n, a_sums, b_sums);
}

// Adds both sums over rows s0 to s1 to the totals of every column. `scratch` has room for two sums
// of each column. It and every kind of coefficient are padded to whole vectors.
//
// Several rows are taken at a time, to load and store the sums less often. They come from different
// parts of the tile, because processors read ahead in several pages at once, but not at several
// places of one page.
template <class T, class F>
static void sum_rows(const Operands<T> &on, const Tile &t, const compute_t<T> *coefficients, long stride,
                     F terms, compute_t<T> *scratch, double *total_a, double *total_b) {
    constexpr long W = Lane<T>::width, DEPTH = 16, ROWS = F::rows_at_once;
    const long columns = t.c1 - t.c0, part = (t.s1 - t.s0) / ROWS;
    const auto &pitch = on.outer;
    const typename Operands<T>::Strides step = {part * pitch.dy, part * pitch.x, part * pitch.extra,
                                                part * pitch.out, part * pitch.mask};
    auto coefficient = [&](long j) { return row_coefficients(on, t, coefficients, stride, j); };
    compute_t<T> *const a_sums = scratch, *const b_sums = scratch + padded(columns);
    auto rows = [&](long from, long to, auto at_once) {
        while (from < to) {
            std::fill(scratch, scratch + 2 * padded(columns), compute_t<T>(0));
            for (const long flush = std::min(from + DEPTH, to); from < flush; ++from) {
                const Pointers<T> pointers = on.pointers_at(from, t.c0, 0);
                long j = 0;
                for (; j + W <= columns; j += W)
                    add_rows<at_once(), true>(pointers.columns_from(j), step, coefficient(j), terms, W,
                                              a_sums + j, b_sums + j);
                if (j < columns)
                    add_row_ends<at_once()>(pointers.columns_from(j), step, coefficient(j), terms,
                                            columns - j, a_sums + j, b_sums + j);
            }
            for (long j = 0; j < columns; ++j) total_a[j] += a_sums[j], total_b[j] += b_sums[j];
        }
    };
    rows(t.s0, t.s0 + part, std::integral_constant<long, ROWS>{});
    rows(t.s0 + part * ROWS, t.s1, std::integral_constant<long, 1>{});
}

// Fills the totals with both sums for each channel of a tile.
template <class T, class F>
static void tile_sums(const Operands<T> &on, const Tile &t, bool rows, const compute_t<T> *coefficients,
                      long stride, F terms, compute_t<T> *scratch, double *total_a, double *total_b) {
    std::fill(total_a, total_a + (t.c1 - t.c0), 0.0);
    std::fill(total_b, total_b + (t.c1 - t.c0), 0.0);
    if (rows)
        sum_rows(on, t, coefficients, stride, terms, scratch, total_a, total_b);
    else
        sum_planes(on, t, coefficients, stride, terms, total_a, total_b);
}

// Fills the sums of the gradient of the activation's input, and of its products with x - mean.
template <class T>
static void tile_reduce(const Operands<T> &on, const Tile &t, bool rows, Activation activation, Source source,
                        const compute_t<T> *coefficients, long stride, compute_t<T> *scratch, double *sum_dy,
                        double *sum_dy_xmu) {
    by_case<Source::output>(activation, source, on.masked(), [&](auto how) {
        tile_sums(on, t, rows, coefficients, stride, Reduce<T, decltype(how)>{how, on.stores()}, scratch,
                  sum_dy, sum_dy_xmu);
    });
}
