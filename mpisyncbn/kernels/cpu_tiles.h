// How the work is cut into tiles and handed to threads. Part of cpu.cpp.

int default_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Values per tile: enough to make its overhead small, few enough to stay in a core's L2 cache.
constexpr long TILE = 1 << 16;
// Below this many values, starting threads takes longer than the work (torch's limit too).
constexpr long PARALLEL = 1 << 15;
// Output of this many bytes would push itself out of the cache: it is written past it.
long stream_from = 4 << 20;

long ceil_div(long length, long divisor) { return (length + divisor - 1) / divisor; }

long cut_planes(long samples, long channels, long positions, std::vector<Tile> &tiles) {
    const long s_parts = ceil_div(positions, TILE), s_step = (ceil_div(positions, s_parts) + 63) / 64 * 64;
    // Long planes one after the other, as they lie; of short ones several samples, whose sums have one end.
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
    // Sums over a tile have an end in memory for every column: of much work, no more tiles than threads may want.
    const long most = std::clamp(rows * columns / 48, TILE, 8 * TILE);
    const long slots = ceil_div(rows, std::max(256L, most / columns)), step = (ceil_div(rows, slots) + 7) / 8 * 8;
    // Too few for the threads: cut across too, which leaves the sums as they are.
    const long c_parts = slots >= threads ? 1 : std::clamp(ceil_div(threads, slots), 1L, std::max(columns / 64, 1L));
    const long c_step = padded(ceil_div(columns, c_parts));
    long slot = 0;
    for (long r = 0; r < rows; r += step, ++slot)
        for (long c = 0; c < columns; c += c_step)
            tiles.push_back({0, 1, c, std::min(c + c_step, columns), r, std::min(r + step, rows), slot});
    return slot;
}

// One way through arrays of one shape: tiles, and what the loops need to find their values.
template <class T>
struct Traversal {
    Operands<T> on;
    bool rows;
    long columns;  // channels, several times over where rows of few channels are taken together
    long count;    // of rows
    bool stream;   // its output goes past the cache
    long slots;
    std::vector<long> counts;  // values per channel of each slot
    std::vector<Tile> tiles;
    void count_values() {
        counts.resize(slots);
        for (const Tile &t : tiles) counts[t.slot] = t.count();
    }
};

template <class T>
struct Plan {
    long channels;
    int threads;
    int traversal_count;
    Traversal<T> traversals[2];  // the second: rows left over by the first
};

// x decides; then dy, what else is read, and what is written. Null where somebody has to copy first. The plan lasts until
// the next one of this thread.
template <class T>
const Plan<T> *plan_for(const Array &x, const Array &dy, const Array &extra, const Array &out, int threads) {
    static thread_local Plan<T> plan;
    Layout lay;
    if (!lay_out({&x, &dy, &extra, &out}, lay)) return nullptr;
    plan.channels = lay.channels;
    plan.threads = x.size() < PARALLEL ? 1 : threads > 0 ? threads : default_threads();
    const bool large = out.data && x.size() * (long)sizeof(T) >= stream_from && (uintptr_t)out.data % 64 == 0;
    plan.traversal_count = 1;
    Traversal<T> &traversal = plan.traversals[0];
    traversal.rows = lay.rows;
    const Array *arrays[] = {&x, &dy, &extra, &out};
    char *start[4];
    for (int i = 0; i < 4; ++i) {
        const int stands_in = arrays[i]->data ? i : 0;  // for an absent one, which is never touched
        start[i] = arrays[stands_in]->data;
        lay.outer[i] = lay.outer[stands_in], lay.channel[i] = lay.channel[stands_in];
    }
    traversal.on = {{(const T *)start[1], (const T *)start[0], (const T *)start[2], (T *)start[3]},
              {lay.outer[1], lay.outer[0], lay.outer[2], lay.outer[3]},
              {lay.channel[1], lay.channel[0], lay.channel[2], lay.channel[3]}};
    traversal.columns = lay.channels;
    traversal.tiles.clear();
    traversal.stream = large;
    if (!lay.rows) {
        traversal.slots = cut_planes(lay.samples, lay.channels, lay.positions, traversal.tiles);
        traversal.count_values();
        return &plan;
    }
    // Several short rows make one that is whole vectors.
    const bool dense = std::all_of(lay.outer, lay.outer + 4, [&](long pitch) { return pitch == lay.channels; });
    long together = 1;
    if (dense && lay.channels < 64) {
        together = 16 / std::gcd(lay.channels, 16L);
        while (lay.channels * together < 64) together *= 2;
    }
    long rows = lay.positions / together;
    if (rows == 0) together = 1, rows = lay.positions;
    if (const long left = lay.positions % together) {
        plan.traversal_count = 2;
        Traversal<T> &tail = plan.traversals[1];
        tail.on = traversal.on, tail.rows = true, tail.columns = lay.channels, tail.stream = false, tail.slots = 1;
        tail.tiles.assign(1, {0, 1, 0, lay.channels, rows * together, rows * together + left, 0});
        tail.count_values();
    }
    auto &pitch = traversal.on.outer;
    pitch.dy *= together, pitch.x *= together, pitch.extra *= together, pitch.out *= together;
    traversal.columns *= together, traversal.count = rows;
    traversal.slots = cut_rows(rows, traversal.columns, plan.threads, traversal.tiles);
    traversal.count_values();
    // a row must begin at a multiple of a vector for its stores to pass the cache
    traversal.stream = large && lay.outer[3] * together * (long)sizeof(T) % 64 == 0;
    return &plan;
}

// Lets Python's other threads run while there is much to do.
struct Unlocked {
    std::optional<nb::gil_scoped_release> release;
    explicit Unlocked(const Array &x) {
        if (x.size() >= PARALLEL) release.emplace();
    }
};

enum class Direction { up, down };

// Calls f for every tile, on each thread in memory order, up or down. The sums go down and what follows them goes up:
// so each pass begins with what the one before it has left in the cache, and the sums with the end of what
// the layer before or after this one has just written.
template <class F>
void each(long length, int threads, Direction direction, F f) {
    auto from_to = [&](long begin, long end) {
        for (long i = begin; i < end; ++i) f(direction == Direction::up ? i : begin + end - 1 - i);
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

template <class W>
W *tile_scratch(size_t length) {
    static thread_local std::vector<W> memory;
    if (memory.size() < length) memory.resize(length);
    return memory.data();
}

// As above, to be used beside it: what the calling thread keeps while tiles are worked on.
template <class W>
W *caller_scratch(size_t length) {
    static thread_local std::vector<W> memory;
    if (memory.size() < length) memory.resize(length);
    return memory.data();
}

// Calls f(traversal, tile, i) for every tile of traversal i of a plan, on every thread. f must not name a thread_local variable: on the
// other threads it is another one. So these are all inside functions, and what f needs of them is bound to a local name.
template <class T, class F>
void every_tile(const Plan<T> &plan, Direction direction, F f) {
    for (int i = 0; i < plan.traversal_count; ++i) {
        const Traversal<T> &traversal = plan.traversals[i];
        each((long)traversal.tiles.size(), plan.threads, direction, [&](long index) { f(traversal, traversal.tiles[index], i); });
    }
}

// What the tiles find out about each channel, `kinds` numbers in double: an array of columns for each kind, for every
// slot of every traversal.
template <class T>
struct Partials {
    const Plan<T> &plan;
    const long kinds;
    double *memory;

    Partials(const Plan<T> &plan, long kinds) : plan(plan), kinds(kinds), memory(partials_memory(length_of(0) + length_of(1))) {}

    // The numbers of one kind, from the tile's first channel on.
    double *at(int traversal, const Tile &t, long kind) const { return start(traversal, t.slot) + kind * plan.traversals[traversal].columns + t.c0; }

    // Calls f(traversal, slot, numbers, columns) in a fixed order, as often as all channels are there: kind k of channel c
    // is numbers[k * columns + c].
    template <class F>
    void in_order(F f) const {
        for (int i = 0; i < plan.traversal_count; ++i)
            for (long slot = 0; slot < plan.traversals[i].slots; ++slot)
                for (long j = 0; j < plan.traversals[i].columns; j += plan.channels)
                    f(i, slot, (const double *)start(i, slot) + j, plan.traversals[i].columns);
    }

   private:
    long length_of(int i) const { return i < plan.traversal_count ? plan.traversals[i].slots * kinds * plan.traversals[i].columns : 0; }
    double *start(int i, long slot) const { return memory + (i ? length_of(0) : 0) + slot * kinds * plan.traversals[i].columns; }
    static double *partials_memory(long length) {
        static thread_local std::vector<double> memory;
        if ((long)memory.size() < length) memory.resize(length);
        return memory.data();
    }
};
