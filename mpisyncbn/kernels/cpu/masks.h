// A mask, read where it is or copied so that the loops read it as they read values. Part of
// module.cpp.
//
// The loops take a byte for each position, in the order of the values in memory. A position counts if
// its byte is not 0. A vector of values in planes may reach into the next plane, and it reads whole
// vectors of bytes. So in the copy the mask of each sample is followed by its own beginning.

// Whether a mask, if there is one, fits x: of its shape, but with one channel.
bool fits(const Array &mask, const Array &x) {
    if (mask.dtype == DType::none) return true;
    if (mask.ndim != x.ndim) return false;
    for (int d = 0; d < x.ndim; ++d)
        if (mask.shape[d] != (d == 1 ? 1 : x.shape[d])) return false;
    return true;
}

// Copies the mask's bytes of x's positions, in the order in which these lie in memory.
class MaskReader {
  public:
    MaskReader(const Array &mask, const Array &x) : data(mask.data) {
        int dims[NDIM];
        const int all = dims_from_innermost(x, dims);
        for (int k = 0; k < all; ++k) {
            const long step = mask.stride[dims[k]], length = x.shape[dims[k]];
            if (count && step == steps[count - 1] * lengths[count - 1])
                lengths[count - 1] *= length;
            else
                steps[count] = step, lengths[count++] = length;
        }
        if (!count) steps[0] = lengths[0] = 1, count = 1;
    }

    // Whether the bytes of all positions follow each other.
    bool is_dense() const { return count == 1 && steps[0] == 1; }

    void copy(long from, long to, int8_t *out) const {
        long digits[NDIM], at = 0, left = from;
        for (int k = 0; k < count; ++k) {
            digits[k] = left % lengths[k], left /= lengths[k];
            at += digits[k] * steps[k];
        }
        while (from < to) {
            const long run = std::min(lengths[0] - digits[0], to - from), step = steps[0];
            const char *const values = data + at;
            if (step == 1)
                std::memcpy(out, values, run);
            else
                for (long i = 0; i < run; ++i) out[i] = values[i * step];
            from += run, out += run, digits[0] += run, at += run * step;
            for (int k = 0; k + 1 < count && digits[k] == lengths[k]; ++k) {
                at += steps[k + 1] - digits[k] * steps[k];
                digits[k] = 0, ++digits[k + 1];
            }
        }
    }

  private:
    const char *data;
    int count = 0;
    long steps[NDIM], lengths[NDIM];
};

// Whether vectors of values lie within planes, and none is cut off: they are aligned, and planes are
// multiples of them.
template <class T>
bool has_whole_vectors(const Array *const (&arrays)[4], const Layout &layout) {
    auto whole = [](long values) { return values * (long)sizeof(T) % 64 == 0; };
    bool all = whole(layout.positions) && layout.positions % 64 == 0;
    for (int i = 0; i < 4; ++i)
        if (arrays[i]->data)
            all = all && (uintptr_t)arrays[i]->data % 64 == 0 && whole(layout.outer[i]) &&
                  whole(layout.channel[i]);
    return all;
}

// Fills `bytes` with the copy of a mask.
void copy_mask(const MaskReader &reader, const Layout &layout, int threads, std::vector<int8_t> &bytes) {
    const long length = layout.positions, pitch = length + MASK_PAD, parts = ceil_div(length, TILE);
    if ((long)bytes.size() < layout.samples * pitch) bytes.resize(layout.samples * pitch);
    int8_t *const to = bytes.data();
    each(layout.samples * parts, threads, Direction::up, [&](long i) {
        const long sample = i / parts, from = i % parts * TILE, until = std::min(from + TILE, length);
        reader.copy(sample * length + from, sample * length + until, to + sample * pitch + from);
    });
    for (long sample = 0; sample < layout.samples; ++sample)
        for (long i = 0; i < MASK_PAD; ++i)
            to[sample * pitch + length + i] = to[sample * pitch + i % length];
}

// Adds, for each i below `sets`, how many of the bytes i, i + sets and so on are not 0. `sets` is a
// power of two, at most 64.
void count_true(const int8_t *mask, long length, long sets, long *counts) {
    long i = 0;
    while (i < length) {
        uint8_t sums[64] = {};
        const long blocks = std::min((length - i) / 64, 255L);
        for (long block = 0; block < blocks; ++block, i += 64)
            for (int k = 0; k < 64; ++k) sums[k] = (uint8_t)(sums[k] + (mask[i + k] != 0));
        for (int k = 0; k < 64; ++k) counts[k % sets] += sums[k];
        if (blocks < 255)
            for (; i < length; ++i) counts[i % sets] += mask[i] != 0;
    }
}

// The first byte from an index on that is not 0; null if there is none.
const int8_t *first_true(const int8_t *mask, long from, long length) {
    for (uint64_t eight; from + 8 <= length; from += 8) {
        std::memcpy(&eight, mask + from, 8);
        if (eight) break;
    }
    for (; from < length; ++from)
        if (mask[from]) return mask + from;
    return nullptr;
}
