// Sums of distances from an origin near the mean, for mean and variance. Included once per
// instruction set by loops.h.

// Fills `origins` with a number near the mean of each channel: the mean of the first values that
// count of a tile's first plane. row_origins takes a few rows instead, spread over all.
template <class T>
static void plane_origins(const Operands<T> &on, const Tile &t, compute_t<T> *origins) {
    struct {
        long n, s;
    } places[8];
    long few = 0;
    for (long n = t.n0; n < t.n1 && few == 0; ++n)
        for (long s = t.s0; s < t.s1 && few < 8; ++s)
            if (on.counts(n, 0, s)) places[few++] = {n, s};
    for (long c = t.c0; c < t.c1; ++c) {
        double sum = 0;
        for (long i = 0; i < few; ++i) sum += value(on.pointers_at(places[i].n, c, places[i].s).x[0]);
        origins[c - t.c0] = (compute_t<T>)(sum / few);
    }
}

// Fills `origins` with the mean of `few` rows for each column. `few` is a power of two, and values are
// added in pairs, so that the origin of a constant channel is its value.
template <class T>
static void row_origins(const T *const *rows, long few, long columns, compute_t<T> *origins) {
    constexpr long W = Lane<T>::width;
    for (long j = 0; j < columns; j += W) {
        const TailAccess access{std::min(W, columns - j)};
        vec<T> sums[8];
        for (long i = 0; i < few; ++i)
            sums[i] = access.get(rows[i] + j) / (compute_t<T>)few;
        for (long half = few / 2; half; half /= 2)
            for (long i = 0; i < half; ++i) sums[i] += sums[i + half];
        write<false>(origins + j, sums[0]);
    }
}

// Whether all values of a channel of a tile, those where the mask is true, are equal.
template <class T>
static bool is_constant(const Operands<T> &on, const Tile &t, bool rows, long c) {
    const long n0 = rows ? t.s0 : t.n0, n1 = rows ? t.s1 : t.n1, s0 = rows ? 0 : t.s0, s1 = rows ? 1 : t.s1;
    const T *first = nullptr;
    for (long n = n0; n < n1; ++n) {
        const T *const x = on.pointers_at(n, c, 0).x;
        for (long s = s0; s < s1; ++s) {
            if (!on.counts(n, c, s)) continue;
            if (!first) first = x + s;
            if (value(x[s]) != value(*first)) return false;
        }
    }
    return true;
}

// Fills, for each channel of a tile, an origin near its mean, the sum of x - origin, and the sum of
// its square, or UNDERFLOWED. Fills nothing if no value counts. `row_origins` are the origins for
// rows. They and `scratch` are padded to whole vectors.
template <class T>
static void tile_moments(const Operands<T> &on, const Tile &t, bool rows, Counts counts,
                         const compute_t<T> *row_origins, compute_t<T> *scratch, double *origin, double *sums,
                         double *squares) {
    if (!counts.any()) return;
    const long channels = t.c1 - t.c0;
    const auto count = [&](long c) { return (double)counts(t.c0 + c); };
    compute_t<T> *origins = scratch + 2 * padded(channels);
    if (rows)
        std::copy(row_origins, row_origins + padded(channels), origins);
    else
        plane_origins(on, t, origins);
    for (int turn = 0; turn < 2; ++turn) {
        if (std::fetestexcept(FE_UNDERFLOW)) std::feclearexcept(FE_UNDERFLOW);  // clearing is slow
        if (on.masked())
            tile_sums(on, t, rows, origins, 0, Moments<T, true>{}, scratch, sums, squares);
        else
            tile_sums(on, t, rows, origins, 0, Moments<T, false>{}, scratch, sums, squares);
        for (long c = 0; c < channels; ++c) origin[c] = origins[c];
        // If an origin is more than two standard deviations from the mean, the squares have lost
        // digits: repeat the sums about the mean. The other channels keep their origins, and get
        // the same sums again.
        const auto cancelled = [&](long c) { return 1.25 * sums[c] * sums[c] > squares[c] * count(c); };
        bool any = false;
        for (long c = 0; c < channels; ++c) any |= cancelled(c);
        if (!any) break;
        for (long c = 0; c < channels; ++c)
            if (cancelled(c) && std::isfinite(sums[c])) origins[c] += (compute_t<T>)(sums[c] / count(c));
    }
    if (sizeof(compute_t<T>) == 8 || std::is_same_v<T, float16>) return;
    // A sum of squares of 0 means a constant channel, unless a square underflowed: then the
    // processor has set its flag.
    const bool underflow = std::fetestexcept(FE_UNDERFLOW);
    const auto unclear = [&](long c) {
        return (squares[c] * count(c) <= sums[c] * sums[c]) & (underflow | (squares[c] > 0));
    };
    bool any = false;
    for (long c = 0; c < channels; ++c) any |= unclear(c);
    if (any)
        for (long c = 0; c < channels; ++c)
            if (unclear(c) && !is_constant(on, t, rows, t.c0 + c)) squares[c] = UNDERFLOWED;
}
