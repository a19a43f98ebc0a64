// The four kernels. Formulas: kernels/protocol.py. Part of module.cpp.

// The outcomes that kernels return. REFUSED: the loops do not read the kind or the layout of some
// array. EXTREME: float32 cannot compute with the values of some channels, and extremes.py has to
// repeat them.
enum { REFUSED, DONE, EXTREME };

int outcome(bool done, bool extreme) { return !done ? REFUSED : extreme ? EXTREME : DONE; }

bool same_kind(const Array &x, std::initializer_list<const Array *> others) {
    return x.ndim >= 2 && std::all_of(others.begin(), others.end(), [&](const Array *other) {
               return !other->data || (other->dtype == x.dtype && other->ndim == x.ndim &&
                                       std::equal(x.shape, x.shape + x.ndim, other->shape));
           });
}

// Merges the moments of the tiles into M2 and the mean in two parts, in a fixed order (Chan, Golub
// and LeVeque 1979). Means are distances from the first origin. A set without values has no origin.
template <class T>
void merge_moments(const Partials<T> &partials, long channels, long count, double *__restrict mean_hi,
                   double *__restrict mean_lo, double *__restrict m2) {
    const double *first = nullptr;
    partials.in_order([&](const long *n, const double *origin, long) {
        if (*n && !first) first = origin;
    });
    std::copy(first, first + channels, mean_hi);
    std::fill(mean_lo, mean_lo + channels, 0.0);
    std::fill(m2, m2 + channels, 0.0);
    partials.in_order([&](const long *values, const double *origin, long columns) {
        if (!*values) return;
        const double n = (double)*values, *const sums = origin + columns;
        for (long c = 0; c < channels; ++c) mean_lo[c] += (origin[c] - mean_hi[c]) * n + sums[c];
    });
    for (long c = 0; c < channels; ++c) mean_lo[c] /= (double)count;
    partials.in_order([&](const long *values, const double *origin, long columns) {
        if (!*values) return;
        const double n = (double)*values, per = 1 / n;
        const double *const sums = origin + columns, *const squares = sums + columns;
        for (long c = 0; c < channels; ++c) {
            const double from_origin = sums[c] * per,
                         from_mean = (origin[c] - mean_hi[c]) + from_origin - mean_lo[c];
            const double about_mean =
                squares[c] == UNDERFLOWED ? DBL_MIN : std::max(squares[c] - sums[c] * from_origin, 0.0);
            m2[c] += about_mean + n * from_mean * from_mean;
        }
    });
}

// Whether distances from the mean in some channel were below 2**-50 or above 2**50: then their
// squares may be 0 or infinite, and sums of distances too: two of them may add up to NaN. (float16 has
// no such distances.) A channel without any distance is constant.
bool is_m2_extreme(long channels, long count, const double *m2) {
    const double least = 0x1p-100 * (double)count, most = 0x1p100 * (double)count;
    bool extreme = false;
    for (long c = 0; c < channels; ++c)
        extreme |= m2[c] != 0 && !(m2[c] >= least && m2[c] <= most);
    return extreme;
}

// Fills `origins` with a number near the mean of each column, from a few rows spread over all.
template <class T>
void fill_row_origins(const Loops<T> &loops, const Plan<T> &plan, compute_t<T> *origins) {
    const Traversal<T> &traversal = plan.traversals[0];
    const Operands<T> &on = traversal.on;
    const T *rows[8];
    if (!on.masked()) {
        long few = 8;
        while (few > traversal.count) few /= 2;
        for (long i = 0; i < few; ++i) rows[i] = on.pointers_at(i * traversal.count / few, 0, 0).x;
        return loops.row_origins(rows, few, traversal.columns, origins);
    }
    // Takes the next row that counts from each of 8 places on, or else the first row that counts. These
    // are single rows, not rows taken together, because the columns of one channel share an origin.
    const long count = plan.positions, pitch = on.outer.x / traversal.sets;
    const int8_t *const mask = on.start.mask;
    const int8_t *const first = first_true(mask, 0, count);
    for (long i = 0; i < 8; ++i) {
        const int8_t *const found = first_true(mask, i * count / 8, count);
        rows[i] = on.start.x + ((found ? found : first) - mask) * pitch;
    }
    loops.row_origins(rows, 8, plan.channels, origins);
    for (long j = plan.channels; j < traversal.columns; ++j) origins[j] = origins[j - plan.channels];
}

// Fills `out` with mean_hi, mean_lo and M2 of each channel. Returns the outcome, and the number of
// values per channel.
std::pair<int, long> local_moments(nb::handle x_object, nb::handle mask_object, const Output &out,
                                   int threads) {
    Array x, mask, none;
    if (!locate(x_object, x) || !locate_mask(mask_object, mask) || !same_kind(x, {}) || !fits(mask, x))
        return {REFUSED, 0};
    const long channels = x.shape[1];
    long count = 0;
    std::fill(out.data(), out.data() + out.size(), 0.0);
    if (x.size() == 0) return {DONE, 0};
    bool extreme = false;
    const bool done = by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        using W = compute_t<T>;
        Plan<T> *const plan = plan_for<T>(x, none, none, none, mask, threads);
        if (!plan) return false;
        count = plan->count_values();
        if (!count) return true;
        const Partials<T> found(*plan, 3);  // origin, sum of x - origin, sum of its square
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        const Traversal<T> &first = plan->traversals[0];
        W *const origins = caller_scratch<W>(padded(first.columns) + 16);
        if (first.rows) fill_row_origins(loops, *plan, origins);
        every_tile(*plan, Direction::down, [&](const Traversal<T> &traversal, const Tile &t, int i) {
            loops.moments(traversal.on, t, traversal.rows, traversal.counts_of(t, channels),
                          origins + t.c0, tile_scratch<W>(3 * padded(t.c1 - t.c0)), found.at(i, t, 0),
                          found.at(i, t, 1), found.at(i, t, 2));
        });
        double *const mean_hi = out.data(), *const mean_lo = mean_hi + channels,
                      *const m2 = mean_lo + channels;
        merge_moments(found, channels, count, mean_hi, mean_lo, m2);
        if (!std::is_same_v<T, double>)
            for (long c = 0; c < channels; ++c) mean_hi[c] += mean_lo[c];
        if (std::is_same_v<T, float> || std::is_same_v<T, bfloat16>)
            extreme = is_m2_extreme(channels, count, m2);
        return true;
    });
    return {outcome(done, extreme), count};
}

// Fills y. Returns the outcome.
int normalize(nb::handle x_object, const Vector &mean, const Vector &invstd, nb::handle weight_object,
              nb::handle bias_object, nb::handle mask_object, nb::handle residual_object,
              nb::handle y_object, int kind, double parameter, int threads) {
    Array x, weight, bias, mask, residual, y;
    if (!locate(x_object, x) || !locate(weight_object, weight) || !locate(bias_object, bias) ||
        !locate_mask(mask_object, mask) || !locate(residual_object, residual) || !locate(y_object, y) ||
        !same_kind(x, {&residual, &y}) || !fits(mask, x))
        return REFUSED;
    if (x.size() == 0) return DONE;
    bool extreme = false;
    const bool done = by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        const Plan<T> *const plan = plan_for<T>(x, Array{}, residual, y, mask, threads);
        if (!plan) return false;
        const auto *all = coefficients_of(*plan, mean, invstd, weight, bias, nullptr, nullptr, extreme);
        const long stride = padded(plan->traversals[0].columns);
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        every_tile(*plan, Direction::up, [&](const Traversal<T> &traversal, const Tile &t, int i) {
            loops.normalize(traversal.on, t, traversal.rows, traversal.stream, all + t.c0, stride,
                            {(Kind)kind, parameter}, residual.data ? Source::residual : Source::x);
        });
        return true;
    });
    return outcome(done, extreme);
}

// Adds up the sums of the tiles in a fixed order. Their products are with x - MEAN, where MEAN is
// the mean rounded to compute_t<T>, so the rest of the mean is accounted for here.
template <class T>
void merge_products(const Partials<T> &partials, long channels, const double *mean, double *__restrict sum_dy,
                    double *__restrict sum_dy_xmu) {
    std::fill(sum_dy, sum_dy + channels, 0.0);
    std::fill(sum_dy_xmu, sum_dy_xmu + channels, 0.0);
    partials.in_order([&](const long *, const double *found, long columns) {
        for (long c = 0; c < channels; ++c) sum_dy[c] += found[c], sum_dy_xmu[c] += found[c + columns];
    });
    for (long c = 0; c < channels; ++c)
        sum_dy_xmu[c] -= (mean[c] - (double)(compute_t<T>)mean[c]) * sum_dy[c];
}

// Whether products of dy and x - mean were too small or too large for float32 in some channel. They
// were too small if one has underflown (those of a constant channel are 0 without that), and too
// large if their sum is not finite although dy and x are.
bool are_products_extreme(long channels, long count, bool underflow, const double *mean, const double *sum_dy,
                          const double *sum_dy_xmu) {
    const double least = 0x1p-100 * (double)count;
    bool extreme = false;
    for (long c = 0; c < channels; ++c) {
        const bool small = underflow && std::fabs(sum_dy_xmu[c]) < least;
        const bool finite = std::isfinite(sum_dy[c]) && std::isfinite(mean[c]);
        extreme |= finite && (small || !std::isfinite(sum_dy_xmu[c]));
    }
    return extreme;
}

// Fills `out` with the two sums of each channel, and `dz` if there is one: there has to be if the
// activation's output was kept beside x, or a residual. `undo`: x is the activation's output, to be
// undone. Returns the outcome.
int backward_reduce(nb::handle dy_object, nb::handle x_object, const Vector &mean, const Vector &invstd,
                    nb::handle weight_object, nb::handle bias_object, nb::handle mask_object,
                    nb::handle y_object, nb::handle residual_object, nb::handle dz_object, int kind,
                    double parameter, bool undo, const Output &out, int threads) {
    Array dy, x, weight, bias, mask, y, residual, dz;
    if (!locate(dy_object, dy) || !locate(x_object, x) || !locate(weight_object, weight) ||
        !locate(bias_object, bias) || !locate_mask(mask_object, mask) || !locate(y_object, y) ||
        !locate(residual_object, residual) || !locate(dz_object, dz) ||
        !same_kind(x, {&dy, &y, &residual, &dz}) || !fits(mask, x))
        return REFUSED;
    if (x.size() == 0) {
        std::fill(out.data(), out.data() + out.size(), 0.0);
        return DONE;
    }
    bool extreme = false;
    const bool done = by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        using W = compute_t<T>;
        const Source source = undo            ? Source::undone
                              : y.data        ? Source::output
                              : residual.data ? Source::residual
                                              : Source::x;
        const Plan<T> *const plan = plan_for<T>(x, dy, y.data ? y : residual, dz, mask, threads);
        if (!plan) return false;
        const auto *all = coefficients_of(*plan, mean, invstd, weight, bias, nullptr, nullptr, extreme);
        const long stride = padded(plan->traversals[0].columns), channels = plan->channels;
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        const Partials<T> found(*plan, 2);
        std::atomic<bool> underflow{false};
        every_tile(*plan, Direction::down, [&](const Traversal<T> &traversal, const Tile &t, int i) {
            if (std::fetestexcept(FE_UNDERFLOW)) std::feclearexcept(FE_UNDERFLOW);  // clearing is slow
            loops.reduce(traversal.on, t, traversal.rows, {(Kind)kind, parameter}, source, all + t.c0, stride,
                         tile_scratch<W>(3 * padded(t.c1 - t.c0)), found.at(i, t, 0), found.at(i, t, 1));
            if (std::fetestexcept(FE_UNDERFLOW)) underflow = true;
        });
        double *const sum_dy = out.data(), *const sum_dy_xmu = sum_dy + channels;
        merge_products(found, channels, mean.data(), sum_dy, sum_dy_xmu);
        if (sizeof(W) < 8)
            extreme |= are_products_extreme(channels, x.size() / channels, underflow, mean.data(), sum_dy,
                                            sum_dy_xmu);
        return true;
    });
    return outcome(done, extreme);
}

// Fills dx. dy is still the gradient of the activation's output, unless its kind is none. `undo`: x
// is the activation's output, to be undone. Returns the outcome.
int backward_elementwise(nb::handle dy_object, nb::handle x_object, const Vector &mean, const Vector &invstd,
                         nb::handle weight_object, nb::handle bias_object, const Vector &mean_dy,
                         const Vector &mean_dy_xmu, nb::handle mask_object, nb::handle dx_object, int kind,
                         double parameter, bool undo, int threads) {
    Array dy, x, weight, bias, mask, dx;
    if (!locate(dy_object, dy) || !locate(x_object, x) || !locate(weight_object, weight) ||
        !locate(bias_object, bias) || !locate_mask(mask_object, mask) || !locate(dx_object, dx) ||
        !same_kind(x, {&dy, &dx}) || !fits(mask, x))
        return REFUSED;
    if (x.size() == 0) return DONE;
    bool extreme = false;
    const bool done = by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        const Plan<T> *const plan = plan_for<T>(x, dy, Array{}, dx, mask, threads);
        if (!plan) return false;
        const auto *all =
            coefficients_of(*plan, mean, invstd, weight, bias, mean_dy.data(), mean_dy_xmu.data(), extreme);
        const long stride = padded(plan->traversals[0].columns);
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        every_tile(*plan, Direction::up, [&](const Traversal<T> &traversal, const Tile &t, int i) {
            loops.elementwise(traversal.on, t, traversal.rows, traversal.stream, all + t.c0, stride,
                              {(Kind)kind, parameter}, undo ? Source::undone : Source::x);
        });
        return true;
    });
    return outcome(done, extreme);
}
