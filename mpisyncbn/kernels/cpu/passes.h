// Element-wise work on a tile. Included once per instruction set by loops.h.

// Applies the operation to n values, fewer than a vector.
template <class T, class F, class K>
NOT_INLINED void apply_to_part(F operation, Pointers<T> pointers, long i, K coefficient, long n) {
    operation.template apply<false>(pointers, i, coefficient, TailAccess{n});
}

// Applies the operation to planes of fewer values than two vectors.
template <class T, class F>
static void pass_short_planes(Pointers<T> pointers, long planes, long length, const compute_t<T> *coefficients,
                              long stride, F operation) {
    constexpr long W = Lane<T>::width;
    for (long c = 0; c < planes; ++c, pointers = pointers.after(length) + length) {
        const PlaneCoefficients<T> coefficient{coefficients + c, stride};
        if (length >= W) operation.template apply<false>(pointers, 0, coefficient, FullAccess{});
        if (const long left = length % W)
            operation.template apply<false>(pointers, length - left, coefficient, TailAccess{left});
    }
}

template <bool STREAM, class T, class F>
static void pass_planes(const Operands<T> &on, const Tile &t, const compute_t<T> *coefficients, long stride,
                        F operation) {
    constexpr long W = Lane<T>::width;
    const long channels = t.c1 - t.c0, length = t.s1 - t.s0, together = on.adjacent(length) ? channels : 1;
    for (long n = t.n0; n < t.n1; ++n)
        for (long from = 0; from < channels; from += together) {
            const Pointers<T> pointers = on.pointers_at(n, t.c0 + from, t.s0);
            const compute_t<T> *const of_plane = coefficients + from;
            if (length < 2 * W) {  // they are not aligned, and so not streamed
                pass_short_planes(pointers, together, length, of_plane, stride, operation);
                continue;
            }
            go_through<T>(
                pointers.out, together, length,
                [&](long i, long vectors, long c) {
                    const PlaneCoefficients<T> coefficient{of_plane + c, stride};
                    const Pointers<T> here = pointers.after(c * length);
                    for (; vectors >= 2; vectors -= 2, i += 2 * W) {
                        operation.template apply<STREAM>(here, i, coefficient, FullAccess{});
                        operation.template apply<STREAM>(here, i + W, coefficient, FullAccess{});
                    }
                    if (vectors) operation.template apply<STREAM>(here, i, coefficient, FullAccess{});
                },
                [&](long i, long c, long values) {
                    operation.template apply<STREAM>(
                        pointers.after(c * length), i,
                        TwoPlanesCoefficients<T>{of_plane + c, stride, values}, FullAccess{});
                },
                [&](long i, long values, long c) {
                    apply_to_part(operation, pointers.after(c * length), i,
                                  PlaneCoefficients<T>{of_plane + c, stride}, values);
                },
                [](long) {});
        }
    if (STREAM) fence();
}

// Applies the operation to two rows at a time, which share the coefficients of the channels. They come
// from the two halves of the tile, for the reason given at sum_rows.
template <bool STREAM, class T, class F>
static void pass_rows(const Operands<T> &on, const Tile &t, const compute_t<T> *coefficients, long stride,
                      F operation) {
    constexpr long W = Lane<T>::width;
    const long columns = t.c1 - t.c0, half = (t.s1 - t.s0) / 2;
    for (long r = t.s0; r < t.s0 + half; ++r) {
        const Pointers<T> one = on.pointers_at(r, t.c0, 0), two = on.pointers_at(r + half, t.c0, 0);
        long j = 0;
        for (; j + W <= columns; j += W) {
            const RowCoefficients<T> coefficient = row_coefficients(on, t, coefficients, stride, j);
            operation.template apply<STREAM>(one, j, coefficient, FullAccess{});
            operation.template apply<STREAM>(two, j, coefficient, FullAccess{});
        }
        if (j < columns) {
            const RowCoefficients<T> coefficient = row_coefficients(on, t, coefficients, stride, j);
            apply_to_part(operation, one, j, coefficient, columns - j);
            apply_to_part(operation, two, j, coefficient, columns - j);
        }
    }
    if ((t.s1 - t.s0) % 2)
        for (long j = 0; j < columns; j += W)
            apply_to_part(operation, on.pointers_at(t.s1 - 1, t.c0, 0), j,
                          row_coefficients(on, t, coefficients, stride, j), std::min(W, columns - j));
    if (STREAM) fence();
}

template <class T, class F>
static void tile_pass(const Operands<T> &on, const Tile &t, bool rows, bool stream,
                      const compute_t<T> *coefficients, long stride, F operation) {
    if (stream) streamed_values.fetch_add((t.c1 - t.c0) * t.count(), std::memory_order_relaxed);
    if (rows)
        stream ? pass_rows<true>(on, t, coefficients, stride, operation)
               : pass_rows<false>(on, t, coefficients, stride, operation);
    else
        stream ? pass_planes<true>(on, t, coefficients, stride, operation)
               : pass_planes<false>(on, t, coefficients, stride, operation);
}

template <class T>
static void tile_normalize(const Operands<T> &on, const Tile &t, bool rows, bool stream,
                           const compute_t<T> *coefficients, long stride, Activation activation,
                           Source source) {
    by_case<Source::residual>(activation, source, on.masked(), [&](auto how) {
        tile_pass(on, t, rows, stream, coefficients, stride, Normalize<T, decltype(how)>{how});
    });
}

// dy is still the gradient of the activation's output, unless `activation` is none.
template <class T>
static void tile_elementwise(const Operands<T> &on, const Tile &t, bool rows, bool stream,
                             const compute_t<T> *coefficients, long stride, Activation activation,
                             Source source) {
    by_case<Source::x>(activation, source, on.masked(), [&](auto how) {
        tile_pass(on, t, rows, stream, coefficients, stride, Elementwise<T, decltype(how)>{how});
    });
}
