// Cuts the work into tiles and hands them to threads. Part of module.cpp.

int default_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Values per tile: enough for a small overhead, few enough to stay in a core's L2 cache.
constexpr long TILE = 1 << 16;
// Below this many values, starting threads takes longer than the work (torch's limit too).
constexpr long PARALLEL = 1 << 15;
// Output of at least so many bytes is written past the cache, which could not hold it.
long stream_from = 4 << 20;

long ceil_div(long length, long divisor) { return (length + divisor - 1) / divisor; }

enum class Direction { up, down };

// Calls operation for every index, on each thread in the order of memory, up or down. Sums go down
// and the passes after them go up. So each pass begins with values that the one before it has left
// in the cache, and sums begin at the end of the array that a neighbouring layer has just written.
template <class F>
void each(long length, int threads, Direction direction, F operation) {
    auto from_to = [&](long begin, long end) {
        for (long i = begin; i < end; ++i) operation(direction == Direction::up ? i : begin + end - 1 - i);
    };
#if defined(_OPENMP)
    if (threads > 1 && length > 1) {
#pragma omp parallel num_threads((int)std::min((long)threads, length))
        {
            const long all = omp_get_num_threads(), me = omp_get_thread_num();
            from_to(length * me / all, length * (me + 1) / all);
        }
        return;
    }
#endif
    from_to(0, length);
}

#include "masks.h"

long cut_planes(long samples, long channels, long positions, std::vector<Tile> &tiles) {
    const long s_parts = ceil_div(positions, TILE), s_step = (ceil_div(positions, s_parts) + 63) / 64 * 64;
    // A tile has long planes in the order of memory, or short planes of several samples, whose sums
    // are then finished only once.
    const long run = positions < 1024 ? TILE / 4 : TILE;
    const long c_most = std::clamp(run / std::min(s_step, positions), 1L, std::min(channels, MAX_CHANNELS));
    const long c_step = ceil_div(channels, ceil_div(channels, c_most));
    const long n_step = std::clamp(TILE / (c_step * std::min(s_step, positions)), 1L, samples);
    long slot = 0;
    for (long n = 0; n < samples; n += n_step, slot += s_parts)
        for (long c = 0; c < channels; c += c_step)
            for (long s = 0, part = 0; s < positions; s += s_step, ++part)
                tiles.push_back({n, std::min(n + n_step, samples), c, std::min(c + c_step, channels), s,
                                 std::min(s + s_step, positions), slot + part});
    return slot;
}

long cut_rows(long rows, long columns, int threads, std::vector<Tile> &tiles) {
    // Each tile stores sums for every column, so much work has no more tiles than threads may want.
    const long most = std::clamp(rows * columns / 48, TILE, 8 * TILE);
    const long slots = ceil_div(rows, std::max(256L, most / columns)),
               step = (ceil_div(rows, slots) + 7) / 8 * 8;
    // If there are too few for the threads, cut columns too, which does not change the sums.
    const long c_parts =
        slots >= threads ? 1 : std::clamp(ceil_div(threads, slots), 1L, std::max(columns / 64, 1L));
    const long c_step = padded(ceil_div(columns, c_parts));
    long slot = 0;
    for (long r = 0; r < rows; r += step, ++slot)
        for (long c = 0; c < columns; c += c_step)
            tiles.push_back({0, 1, c, std::min(c + c_step, columns), r, std::min(r + step, rows), slot});
    return slot;
}

// A way through arrays of one shape: the tiles, and where the loops find their values.
template <class T>
struct Traversal {
    Operands<T> on;
    bool rows;
    long columns;  // channels, repeated if several rows of few channels are taken together
    long count;    // of rows
    bool stream;   // its output goes past the cache
    long slots;
    long sets;                 // how many rows are taken together
    std::vector<long> counts;  // values per channel, of each set of each slot
    std::vector<Tile> tiles;
    void count_values() {
        counts.assign(slots * sets, 0);
        for (const Tile &t : tiles)
            if (t.c0 == 0) count_values(t, counts.data() + t.slot * sets);
    }
    void count_values(const Tile &t, long *into) const {
        if (!on.masked())
            std::fill(into, into + sets, t.count());
        else if (rows)
            count_true(on.start.mask + t.s0 * sets, (t.s1 - t.s0) * sets, sets, into);
        else
            for (long n = t.n0; n < t.n1; ++n)
                count_true(on.pointers_at(n, 0, t.s0).mask, t.s1 - t.s0, 1, into);
    }
    Counts counts_of(const Tile &t, long channels) const {
        return {counts.data() + t.slot * sets, sets, channels};
    }
};

template <class T>
struct Plan {
    long channels, positions;  // positions of a sample in planes; rows
    int threads;
    int traversal_count;
    Traversal<T> traversals[2];  // the second has rows that the first leaves over
    std::vector<int8_t> mask;
    std::vector<uint8_t> row_of_column;

    // Counts the values of all slots. Returns the sum.
    long count_values() {
        long count = 0;
        for (int i = 0; i < traversal_count; ++i) {
            traversals[i].count_values();
            for (long n : traversals[i].counts) count += n;
        }
        return count;
    }
};

// Addresses and strides for the loops, without a mask. Those of x stand in for an absent array, which
// no loop touches.
template <class T>
Operands<T> operands_of(const Array *const (&arrays)[4], const Layout &layout) {
    char *start[4];
    long outer[4], channel[4];
    for (int i = 0; i < 4; ++i) {
        const int from = arrays[i]->data ? i : 0;
        start[i] = arrays[from]->data, outer[i] = layout.outer[from], channel[i] = layout.channel[from];
    }
    return {{(const T *)start[1], (const T *)start[0], (const T *)start[2], (T *)start[3], &NO_MASK},
            {outer[1], outer[0], outer[2], outer[3], 0},
            {channel[1], channel[0], channel[2], channel[3], 0},
            nullptr};
}

// How many rows may be taken together. A vector of values then reads a whole vector of a mask, so the
// rows of the mask's last bytes are left over.
template <class T>
long positions_together(const Operands<T> &on, const Layout &layout) {
    return layout.positions - (on.masked() ? MASK_PAD : 0);
}

// How many rows are taken together as one row of whole vectors, if rows are short and follow each
// other without a gap; else 1.
template <class T>
long rows_taken_together(const Operands<T> &on, const Layout &layout) {
    const auto &pitch = on.outer;
    const long channels = layout.channels;
    const bool dense =
        pitch.dy == channels && pitch.x == channels && pitch.extra == channels && pitch.out == channels;
    if (!dense || channels >= 64) return 1;
    long together = 16 / std::gcd(channels, 16L);
    while (channels * together < 64) together *= 2;
    return together <= positions_together(on, layout) ? together : 1;
}

// Cuts rows into tiles of the first traversal. If several rows are taken together, the second
// traversal has the rows left over.
template <class T>
void plan_rows(Plan<T> &plan, const Layout &layout) {
    Traversal<T> &traversal = plan.traversals[0];
    const long together = rows_taken_together(traversal.on, layout);
    const long rows = (together > 1 ? positions_together(traversal.on, layout) : layout.positions) / together;
    if (const long left = layout.positions - rows * together) {
        plan.traversal_count = 2;
        Traversal<T> &tail = plan.traversals[1];
        tail.on = traversal.on, tail.rows = true, tail.columns = layout.channels, tail.stream = false,
        tail.slots = 1, tail.sets = 1;
        tail.tiles.assign(1, {0, 1, 0, layout.channels, rows * together, rows * together + left, 0});
    }
    traversal.sets = together;
    if (together > 1 && traversal.on.masked()) {
        auto &row_of = plan.row_of_column;
        row_of.assign(padded(layout.channels * together) + 16, 0);
        for (long j = 0; j < layout.channels * together; ++j) row_of[j] = (uint8_t)(j / layout.channels);
        traversal.on.row_of_column = row_of.data();
    }
    auto &pitch = traversal.on.outer;
    pitch.dy *= together, pitch.x *= together, pitch.extra *= together, pitch.out *= together;
    pitch.mask *= together;
    traversal.columns *= together, traversal.count = rows;
    traversal.slots = cut_rows(rows, traversal.columns, plan.threads, traversal.tiles);
    // a row must begin at a multiple of a vector for its stores to pass the cache
    traversal.stream = traversal.stream && pitch.out * (long)sizeof(T) % 64 == 0;
}

// The plan for arrays of one shape: x, which decides the layout, dy, another one to read (`extra`),
// and one to write (`out`). It is valid until this thread makes the next plan. Null if the arrays
// do not all lie in memory in one way: then the caller has to copy some. The mask may lie in any way.
template <class T>
Plan<T> *plan_for(const Array &x, const Array &dy, const Array &extra, const Array &out, const Array &mask,
                  int threads) {
    static thread_local Plan<T> plan;
    const Array *const arrays[4] = {&x, &dy, &extra, &out};
    Layout layout;
    if (!lay_out(arrays, layout)) return nullptr;
    plan.channels = layout.channels, plan.positions = layout.positions;
    plan.threads = x.size() < PARALLEL ? 1 : threads > 0 ? threads : default_threads();
    plan.traversal_count = 1;
    Traversal<T> &traversal = plan.traversals[0];
    traversal.on = operands_of<T>(arrays, layout);
    if (mask.data) {
        const MaskReader reader(mask, x);
        const bool as_it_is = reader.is_dense() && (layout.rows || has_whole_vectors<T>(arrays, layout));
        if (!as_it_is) copy_mask(reader, layout, plan.threads, plan.mask);
        traversal.on.start.mask = as_it_is ? (const int8_t *)mask.data : plan.mask.data();
        traversal.on.outer.mask = layout.rows ? 1 : layout.positions + (as_it_is ? 0 : MASK_PAD);
    }
    traversal.rows = layout.rows;
    traversal.columns = layout.channels;
    traversal.sets = 1;
    traversal.tiles.clear();
    traversal.stream = out.data && x.size() * (long)sizeof(T) >= stream_from && (uintptr_t)out.data % 64 == 0;
    if (layout.rows)
        plan_rows(plan, layout);
    else
        traversal.slots = cut_planes(layout.samples, layout.channels, layout.positions, traversal.tiles);
    return &plan;
}

// Releases Python's lock if there is much to do.
struct Unlocked {
    std::optional<nb::gil_scoped_release> release;
    explicit Unlocked(const Array &x) {
        if (x.size() >= PARALLEL) release.emplace();
    }
};

// Memory of this thread for a tile.
template <class W>
W *tile_scratch(size_t length) {
    static thread_local std::vector<W> memory;
    if (memory.size() < length) memory.resize(length);
    return memory.data();
}

// Memory of the calling thread, which it keeps while all threads use tile_scratch.
template <class W>
W *caller_scratch(size_t length) {
    static thread_local std::vector<W> memory;
    if (memory.size() < length) memory.resize(length);
    return memory.data();
}

// Calls operation(traversal, tile, i) for every tile of traversal i of a plan, on several threads.
// An operation must not name a thread_local variable, which is a different one on each thread. So
// all of them are inside functions, and an operation captures a local pointer or reference instead.
template <class T, class F>
void every_tile(const Plan<T> &plan, Direction direction, F operation) {
    for (int i = 0; i < plan.traversal_count; ++i) {
        const Traversal<T> &traversal = plan.traversals[i];
        each((long)traversal.tiles.size(), plan.threads, direction,
             [&](long index) { operation(traversal, traversal.tiles[index], i); });
    }
}

// The partial results of the tiles: `kinds` double numbers for each channel. Every slot of every
// traversal has an array of columns for each kind.
template <class T>
struct Partials {
    const Plan<T> &plan;
    const long kinds;
    double *memory;

    Partials(const Plan<T> &plan, long kinds)
        : plan(plan), kinds(kinds), memory(partials_memory(length_of(0) + length_of(1))) {}

    // The numbers of one kind, from the tile's first channel on.
    double *at(int traversal, const Tile &t, long kind) const {
        return start(traversal, t.slot) + kind * plan.traversals[traversal].columns + t.c0;
    }

    // Calls operation(count, numbers, columns) in a fixed order, once for each set of all channels.
    // Kind k of channel c is numbers[k * columns + c]; `count` is where its number of values is.
    template <class F>
    void in_order(F operation) const {
        for (int i = 0; i < plan.traversal_count; ++i)
            for (long slot = 0; slot < plan.traversals[i].slots; ++slot)
                for (long set = 0; set < plan.traversals[i].sets; ++set)
                    operation(plan.traversals[i].counts.data() + slot * plan.traversals[i].sets + set,
                              (const double *)start(i, slot) + set * plan.channels,
                              plan.traversals[i].columns);
    }

  private:
    long length_of(int i) const {
        return i < plan.traversal_count ? plan.traversals[i].slots * kinds * plan.traversals[i].columns : 0;
    }
    double *start(int i, long slot) const {
        return memory + (i ? length_of(0) : 0) + slot * kinds * plan.traversals[i].columns;
    }
    static double *partials_memory(long length) {
        static thread_local std::vector<double> memory;
        if ((long)memory.size() < length) memory.resize(length);
        return memory.data();
    }
};
