// The four verbs for arrays in host memory, at the speed of memory. Formulas: kernels/__init__.py.
//
// Takes NumPy arrays and torch tensors alike, by address, shape and strides, so one build serves every torch.
// From here down: what Python calls; how the work is cut into tiles; cpu_loops.h has the loops over a tile,
// cpu_lanes.h the vectors, both compiled once per instruction set, and the processor chooses at run time.
//
// The tiles depend on the shape alone, and their sums are added up in a fixed order: the same bits come out
// at any number of threads.

#include <nb_combined.cpp>  // nanobind itself, so that setuptools can build us without CMake

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace nb = nanobind;

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

namespace {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

float value(float v) { return v; }
double value(double v) { return v; }
float value(bfloat16 v) {
    const uint32_t wide = (uint32_t)v.bits << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
}
float value(float16 v) {
    const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                           : std::ldexp((float)mantissa, -24);
    return v.bits >> 15 ? -magnitude : magnitude;
}

template <class T>
using work_of = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What is known per channel, each kind in an array of its own.
enum { MEAN, SCALE, SHIFT, SLOPE, REST, KINDS };
// Where a gradient meets a ReLU: nowhere; where the output, computed again from x, is not positive; where the
// output itself is not.
enum class Gate { none, recomputed, saved };

template <class T>
struct At {
    const T *dy, *x, *extra;
    T *out;
    INLINE_MEMBER At operator+(long i) const { return {dy + i, x + i, extra + i, out + i}; }
};

// Addresses and strides of up to four arrays of one shape. Planes: strides from sample to sample and from
// channel to channel; rows: from row to row, and 1.
template <class T>
struct Operands {
    At<T> start;
    struct Strides {
        long dy, x, extra, out;
    } outer, channel;
    INLINE_MEMBER At<T> at(long n, long c, long s) const {
        return {start.dy + (n * outer.dy + c * channel.dy + s), start.x + (n * outer.x + c * channel.x + s),
                start.extra + (n * outer.extra + c * channel.extra + s),
                start.out + (n * outer.out + c * channel.out + s)};
    }
    // Whether planes of this length follow each other without a gap.
    INLINE_MEMBER bool adjacent(long length) const {
        return channel.dy == length && channel.x == length && channel.extra == length && channel.out == length;
    }
};

// Samples, channels and positions of a piece of work; of rows, s0 to s1 are the rows and there are no samples.
struct Tile {
    long n0, n1, c0, c1, s0, s1;
    long slot;  // tiles of one slot have the same values per channel, of different channels
};

constexpr long MAX_CHANNELS = 256;  // of a tile of planes
constexpr int NDIM = 64;              // as many as NumPy has at most; torch may have more, which are refused

long padded(long length) { return (length + 15) / 16 * 16; }

void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

template <class T>
struct Loops {
    using W = work_of<T>;
    void (*row_shifts)(const Operands<T> &, long rows, long columns, W *shifts);
    void (*moments)(const Operands<T> &, const Tile &, bool rows, long count, const W *shifts, W *scratch, double *,
                    double *, double *);
    void (*reduce)(const Operands<T> &, const Tile &, bool rows, Gate, const W *, long, W *scratch, double *, double *);
    void (*normalize)(const Operands<T> &, const Tile &, bool rows, bool stream, const W *, long, bool add, bool relu);
    void (*elementwise)(const Operands<T> &, const Tile &, bool rows, bool stream, const W *, long, bool gated);
};

namespace baseline {
#define LANES 4
#include "cpu_lanes.h"
#include "cpu_loops.h"
#undef LANES
}  // namespace baseline

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define HAVE_LEVELS
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(t) PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#define WIDE
#else
#define BEGIN_TARGET(t) PRAGMA(GCC push_options) PRAGMA(GCC target(t))
#define END_TARGET PRAGMA(GCC pop_options)
#define WIDE ",prefer-vector-width=512"
#endif

BEGIN_TARGET("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#include "cpu_lanes.h"
#include "cpu_loops.h"
#undef LANES
}  // namespace avx2
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" WIDE)
namespace avx512 {
#define LANES 16
#include "cpu_lanes.h"
#include "cpu_loops.h"
#undef LANES
}  // namespace avx512
END_TARGET

BEGIN_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" WIDE)
namespace avx512bf16 {  // for bfloat16 alone: rounding to it takes as long as all the rest otherwise
#define LANES 16
#define BF16_INSTRUCTIONS
#include "cpu_lanes.h"
#include "cpu_loops.h"
#undef BF16_INSTRUCTIONS
#undef LANES
}  // namespace avx512bf16
END_TARGET
#endif

enum class Level { baseline, avx2, avx512, avx512bf16 };
Level highest_level = Level::avx512bf16;  // lowered by tests, to have the others run

Level level() {
#ifdef HAVE_LEVELS
    auto has_avx512 = [] {
        return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    };
    static const Level best = has_avx512() ? __builtin_cpu_supports("avx512bf16") ? Level::avx512bf16 : Level::avx512
                              : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")  // and F16C, as all of them
                                  ? Level::avx2
                                  : Level::baseline;
    return std::min(best, highest_level);
#else
    return Level::baseline;
#endif
}

template <class T>
const Loops<T> &best_loops() {
#ifdef HAVE_LEVELS
    switch (level()) {
        case Level::avx512bf16:
            if constexpr (std::is_same_v<T, bfloat16>) return avx512bf16::loops<T>;
        case Level::avx512: return avx512::loops<T>;
        case Level::avx2: return avx2::loops<T>;
        default: break;
    }
#endif
    return baseline::loops<T>;
}

// An array as Python has it. Strides count values.
enum class DType { none, f16, bf16, f32, f64 };

struct Array {
    char *data = nullptr;
    DType dtype = DType::none;
    int ndim = 0;
    long shape[NDIM], stride[NDIM];

    long size() const { return std::accumulate(shape, shape + ndim, 1L, std::multiplies<long>()); }
    double operator[](long i) const {  // of a vector
        const long at = i * stride[0];
        switch (dtype) {
            case DType::f16: return value(((const float16 *)data)[at]);
            case DType::bf16: return value(((const bfloat16 *)data)[at]);
            case DType::f32: return ((const float *)data)[at];
            default: return ((const double *)data)[at];
        }
    }
};

// DLPack's way to look at a tensor without a Python call for each of its properties (dlpack.h, since version 1.2;
// torch has it since 2.10).
struct ExchangeAPI {
    uint32_t major, minor;
    void *previous;
    void *allocator, *from_object, *to_object;
    int (*look)(void *object, struct DLTensor *tensor);
    void *stream;
};

struct DLTensor {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

const ExchangeAPI *exchange_api(nb::handle torch) {
    const nb::object capsule = nb::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", nb::none());
    const auto *api = (const ExchangeAPI *)PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    PyErr_Clear();  // of a torch without one
    return api && api->major == 1 && api->look ? api : nullptr;
}

bool describe_quickly(const ExchangeAPI &api, nb::handle object, Array &array) {
    DLTensor tensor;
    if (api.look(object.ptr(), &tensor) != 0) {
        PyErr_Clear();  // a tensor without memory of its own
        return false;
    }
    array.dtype = tensor.code == 4 && tensor.bits == 16  ? DType::bf16
                  : tensor.code != 2 || tensor.lanes != 1 ? DType::none
                  : tensor.bits == 16                     ? DType::f16
                  : tensor.bits == 32                     ? DType::f32
                  : tensor.bits == 64                     ? DType::f64
                                                          : DType::none;
    if (tensor.ndim > NDIM) return false;
    array.data = (char *)tensor.data + tensor.byte_offset;
    array.ndim = tensor.ndim;
    std::copy(tensor.shape, tensor.shape + tensor.ndim, array.shape);
    std::copy(tensor.strides, tensor.strides + tensor.ndim, array.stride);
    return tensor.device_type == 1 && array.dtype != DType::none && (array.data || array.size() == 0);
}

bool describe_by_name(nb::handle torch, nb::handle object, Array &array) {
    static PyObject *const names[] = {PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("shape"),
                                      PyUnicode_InternFromString("stride"), PyUnicode_InternFromString("data_ptr"),
                                      PyUnicode_InternFromString("is_cpu")};
    static PyObject *const dtypes[] = {torch.attr("float16").ptr(), torch.attr("bfloat16").ptr(),
                                       torch.attr("float32").ptr(), torch.attr("float64").ptr()};
    const nb::object dtype = object.attr(names[0]);
    const auto known = std::find(dtypes, dtypes + 4, dtype.ptr());
    if (known == dtypes + 4 || object.attr(names[4]).ptr() != Py_True) return false;
    array.dtype = (DType)(known - dtypes + 1);
    const nb::object shape = object.attr(names[1]), stride = nb::steal(PyObject_CallMethodNoArgs(object.ptr(), names[2])),
                     address = nb::steal(PyObject_CallMethodNoArgs(object.ptr(), names[3]));
    if (!stride.is_valid() || !address.is_valid()) {
        PyErr_Clear();
        return false;
    }
    if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr()) || PyTuple_GET_SIZE(shape.ptr()) > NDIM) return false;
    array.ndim = (int)PyTuple_GET_SIZE(shape.ptr());
    for (int d = 0; d < array.ndim; ++d) {
        array.shape[d] = PyLong_AsLong(PyTuple_GET_ITEM(shape.ptr(), d));
        array.stride[d] = PyLong_AsLong(PyTuple_GET_ITEM(stride.ptr(), d));
    }
    array.data = (char *)PyLong_AsVoidPtr(address.ptr());
    if (PyErr_Occurred()) throw nb::python_error();
    return array.data || array.size() == 0;
}

// None is an array without data. Returns false for what is neither a NumPy array nor a torch tensor of a dtype
// that the loops know.
bool describe(nb::handle object, Array &array, bool to_write = false) {
    if (object.is_none()) return true;
    if (PyObject_CheckBuffer(object.ptr())) {  // NumPy
        Py_buffer view;
        if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_STRIDES | PyBUF_FORMAT | (to_write ? PyBUF_WRITABLE : 0)) != 0) {
            PyErr_Clear();
            return false;
        }
        const char *format = view.format;
        array.dtype = std::strlen(format) != 1 ? DType::none
                      : *format == 'e'         ? DType::f16
                      : *format == 'f'         ? DType::f32
                      : *format == 'd'         ? DType::f64
                                               : DType::none;
        bool whole = array.dtype != DType::none && (uintptr_t)view.buf % view.itemsize == 0;
        array.data = (char *)view.buf;
        array.ndim = view.ndim;
        for (int d = 0; d < view.ndim; ++d) {
            array.shape[d] = view.shape[d];
            array.stride[d] = view.strides[d] / view.itemsize;
            whole = whole && view.strides[d] % view.itemsize == 0;
        }
        PyBuffer_Release(&view);  // the caller holds the array until we are done
        return whole;
    }
    // Kept for good: at exit Python may be gone before us.
    static const nb::handle torch = nb::module_::import_("torch").release();
    static const ExchangeAPI *const api = exchange_api(torch);
    static PyObject *const plain = torch.attr("Tensor").ptr(), *const parameter = torch.attr("nn").attr("Parameter").ptr();
    static PyObject *const is_neg = PyUnicode_InternFromString("is_neg");
    const PyObject *const type = (PyObject *)Py_TYPE(object.ptr());
    const nb::object negated = nb::steal(PyObject_CallMethodNoArgs(object.ptr(), is_neg));
    if (negated.ptr() != Py_False) {  // its sign is yet to be changed, which its memory does not tell
        PyErr_Clear();
        return false;
    }
    return api && (type == plain || type == parameter) ? describe_quickly(*api, object, array)
                                                       : describe_by_name(torch, object, array);
}

// How arrays of one shape lie in memory, all in the same way: as planes, or as rows.
struct Layout {
    bool rows;
    long samples, channels, positions;  // of rows: one sample
    long outer[4], channel[4];          // strides of each array
};

// Returns false where they do not: then somebody has to copy. arrays[0] decides; absent ones have no data.
bool lay_out(const Array *const (&arrays)[4], Layout &layout) {
    const Array &x = *arrays[0];
    int dims[NDIM], count = 0;  // all but that of the channels, the innermost first
    for (int d = 0; d < x.ndim; ++d)
        if (d != 1 && x.shape[d] != 1) dims[count++] = d;
    // An expanded dimension, with stride 0, is outermost: it says the same again.
    auto far = [&](int d) { return x.stride[d] ? (unsigned long)x.stride[d] : ~0ul; };
    std::sort(dims, dims + count, [&](int a, int b) { return far(a) < far(b); });

    auto all = [&](auto holds) {
        for (int i = 0; i < 4; ++i)
            if (arrays[i]->data && !holds(*arrays[i], i)) return false;
        return true;
    };
    // Takes together dimensions from the given one on, as far as they follow each other in every array.
    auto merge = [&](int &from, long (&stride)[4]) {
        long length = 1;
        if (from < count)
            all([&](const Array &array, int i) {
                stride[i] = array.stride[dims[from]];
                return true;
            });
        for (; from < count; ++from) {
            if (!all([&](const Array &array, int i) { return array.stride[dims[from]] == stride[i] * length; })) break;
            length *= x.shape[dims[from]];
        }
        return length;
    };

    layout.channels = x.shape[1];
    layout.samples = 1;
    int from = 0;
    layout.rows = x.shape[1] > 1 && all([](const Array &array, int) { return array.stride[1] == 1; });
    for (int i = 0; i < 4; ++i) {
        layout.outer[i] = layout.channels;
        layout.channel[i] = arrays[i]->data && x.shape[1] > 1 ? arrays[i]->stride[1] : layout.rows;
    }
    if (layout.rows) {
        layout.positions = merge(from, layout.outer);
    } else {
        long inner[4] = {1, 1, 1, 1};
        layout.positions = merge(from, inner);
        if (!all([&](const Array &, int i) { return inner[i] == 1; })) return false;
        layout.samples = merge(from, layout.outer);
    }
    return from == count;
}

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

long parts(long length, long most) { return (length + most - 1) / most; }

long cut_planes(long samples, long channels, long positions, std::vector<Tile> &tiles) {
    const long s_parts = parts(positions, TILE), s_step = (parts(positions, s_parts) + 63) / 64 * 64;
    // Long planes one after the other, as they lie; of short ones several samples, whose sums have one end.
    const long run = positions < 1024 ? TILE / 4 : TILE;
    const long c_most = std::clamp(run / std::min(s_step, positions), 1L, std::min(channels, MAX_CHANNELS));
    const long c_step = parts(channels, parts(channels, c_most));
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
    const long slots = parts(rows, std::max(256L, TILE / columns)), step = (parts(rows, slots) + 7) / 8 * 8;
    // Too few for the threads: cut across too, which leaves the sums as they are.
    const long c_parts = slots >= threads ? 1 : std::clamp(parts(threads, slots), 1L, std::max(columns / 64, 1L));
    const long c_step = padded(parts(columns, c_parts));
    long slot = 0;
    for (long r = 0; r < rows; r += step, ++slot)
        for (long c = 0; c < columns; c += c_step)
            tiles.push_back({0, 1, c, std::min(c + c_step, columns), r, std::min(r + step, rows), slot});
    return slot;
}

// One way through arrays of one shape: tiles, and what the loops need to find their values.
template <class T>
struct Way {
    Operands<T> on;
    bool rows;
    long columns;  // channels, several times over where rows of few channels are taken together
    long count;    // of rows
    long slots;
    std::vector<Tile> tiles;
};

template <class T>
struct Plan {
    long channels;
    int threads;
    bool stream;
    int ways;
    Way<T> way[2];  // the second: rows left over by the first
    long count(const Tile &t) const { return (t.n1 - t.n0) * (t.s1 - t.s0); }
};

// x decides; then dy, what else is read, and what is written.
template <class T>
bool plan_for(const Array &x, const Array &dy, const Array &extra, const Array &out, int threads, Plan<T> &plan) {
    Layout lay;
    if (!lay_out({&x, &dy, &extra, &out}, lay)) return false;
    plan.channels = lay.channels;
    plan.threads = x.size() < PARALLEL ? 1 : threads > 0 ? threads : default_threads();
    plan.stream = out.data && x.size() * (long)sizeof(T) >= stream_from && (uintptr_t)out.data % 64 == 0;
    plan.ways = 1;
    Way<T> &way = plan.way[0];
    way.rows = lay.rows;
    const Array *arrays[] = {&x, &dy, &extra, &out};
    char *start[4];
    for (int i = 0; i < 4; ++i) {
        const int stands_in = arrays[i]->data ? i : 0;  // for an absent one, which is never touched
        start[i] = arrays[stands_in]->data;
        lay.outer[i] = lay.outer[stands_in], lay.channel[i] = lay.channel[stands_in];
    }
    way.on = {{(const T *)start[1], (const T *)start[0], (const T *)start[2], (T *)start[3]},
              {lay.outer[1], lay.outer[0], lay.outer[2], lay.outer[3]},
              {lay.channel[1], lay.channel[0], lay.channel[2], lay.channel[3]}};
    way.columns = lay.channels;
    way.tiles.clear();
    if (!lay.rows) {
        way.slots = cut_planes(lay.samples, lay.channels, lay.positions, way.tiles);
        return true;
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
        plan.ways = 2;
        Way<T> &rest = plan.way[1];
        rest.on = way.on, rest.rows = true, rest.columns = lay.channels, rest.slots = 1;
        rest.tiles.assign(1, {0, 1, 0, lay.channels, rows * together, rows * together + left, 0});
    }
    auto &pitch = way.on.outer;
    pitch.dy *= together, pitch.x *= together, pitch.extra *= together, pitch.out *= together;
    way.columns *= together, way.count = rows;
    way.slots = cut_rows(rows, way.columns, plan.threads, way.tiles);
    // a row must begin at a multiple of a vector for its stores to pass the cache
    plan.stream = plan.stream && lay.outer[3] * together * (long)sizeof(T) % 64 == 0;
    return true;
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
W *scratch(size_t length) {
    static thread_local std::vector<W> memory;
    if (memory.size() < length) memory.resize(length);
    return memory.data();
}

// As above, to be used beside it: what the calling thread keeps while tiles are worked on.
template <class W>
W *kept(size_t length) {
    static thread_local std::vector<W> memory;
    if (memory.size() < length) memory.resize(length);
    return memory.data();
}

using Vector = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A vector of parameters, of whatever dtype and stride; null for an absent one. Two at a time.
const double *values_of(const Array &vector, long length, int which) {
    if (!vector.data) return nullptr;
    static thread_local std::vector<double> memory[2];
    memory[which].resize(length);
    double *const values = memory[which].data();
    if (vector.dtype == DType::f32)
        for (long c = 0; c < length; ++c) values[c] = ((const float *)vector.data)[c * vector.stride[0]];
    else
        for (long c = 0; c < length; ++c) values[c] = vector[c];
    return values;
}

// What the loops take per channel, from what the formulas take, in double and rounded once.
// x - mean is x - MEAN exactly where it matters, and what rounding the mean left goes into SHIFT and REST.
template <class T>
const work_of<T> *numbers(const Plan<T> &plan, const Vector &mean, const Vector &invstd, const Array &weight,
                          const Array &bias, const double *mean_dy, const double *mean_dy_xmu) {
    using W = work_of<T>;
    const long columns = plan.way[0].columns, stride = padded(columns);
    W *const all = kept<W>(KINDS * stride);
    W *__restrict near = all + MEAN * stride, *__restrict scales = all + SCALE * stride;
    W *__restrict shifts = all + SHIFT * stride, *__restrict slopes = all + SLOPE * stride, *__restrict rests = all + REST * stride;
    const double *const means = mean.data(), *const invstds = invstd.data();
    const double *const weights = values_of(weight, plan.channels, 0), *const biases = values_of(bias, plan.channels, 1);
    for (long c = 0; c < plan.channels; ++c) {
        const W center = (W)means[c];
        const double rest = means[c] - (double)center, scale = weights ? invstds[c] * weights[c] : invstds[c];
        near[c] = center;
        scales[c] = (W)scale;
        shifts[c] = (W)((biases ? biases[c] : 0.0) - rest * scale);
    }
    if (mean_dy)
        for (long c = 0; c < plan.channels; ++c) {
            const double rest = means[c] - (double)near[c], scale = weights ? invstds[c] * weights[c] : invstds[c];
            const double slope = -scale * invstds[c] * invstds[c] * mean_dy_xmu[c];
            slopes[c] = (W)slope;
            rests[c] = (W)(-scale * mean_dy[c] - rest * slope);
        }
    for (int kind = 0; kind < (mean_dy ? KINDS : SLOPE); ++kind) {
        W *row = all + kind * stride;
        for (long c = plan.channels; c < columns; ++c) row[c] = row[c - plan.channels];
        std::fill(row + columns, row + stride, W(0));
    }
    return all;
}

// Calls f with a value of the type that the loops have for a dtype.
template <class F>
bool by_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::f16: return f(float16{});
        case DType::bf16: return f(bfloat16{});
        case DType::f32: return f(float{});
        case DType::f64: return f(double{});
        default: return false;
    }
}

bool same_kind(const Array &x, std::initializer_list<const Array *> others) {
    return x.ndim >= 2 && std::all_of(others.begin(), others.end(), [&](const Array *other) {
               return !other->data || (other->dtype == x.dtype && other->ndim == x.ndim &&
                                       std::equal(x.shape, x.shape + x.ndim, other->shape));
           });
}

long local_moments(nb::handle x_object, const Output &out, int threads) {
    Array x, none;
    if (!describe(x_object, x) || !same_kind(x, {})) return -1;
    if (x.size() == 0) {
        std::fill(out.data(), out.data() + out.size(), 0.0);
        return 0;
    }
    const bool done = by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        using W = work_of<T>;
        static thread_local Plan<T> plan;
        if (!plan_for(x, none, none, none, threads, plan)) return false;
        // For each slot and column: number of values, shift, sum of x - shift, sum of its square.
        long lengths[2] = {}, wholes[2] = {};
        for (int i = 0; i < plan.ways; ++i) wholes[i] = plan.way[i].slots * (lengths[i] = 3 * plan.way[i].columns);
        double *const sums = kept<double>(wholes[0] + wholes[1]);
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        static thread_local std::vector<W> shifts;
        shifts.resize(padded(plan.way[0].columns) + 16);
        static thread_local std::vector<long> counts[2];
        for (int i = 0; i < plan.ways; ++i) {
            const Way<T> &way = plan.way[i];
            counts[i].resize(way.slots);
            long *const count = counts[i].data();
            for (const Tile &t : way.tiles) count[t.slot] = plan.count(t);
            double *const base = sums + i * wholes[0];
            W *const near = shifts.data();
            if (way.rows && i == 0) loops.row_shifts(way.on, way.count, way.columns, near);
            each((long)way.tiles.size(), plan.threads, Direction::down, [&](long index) {
                const Tile &t = way.tiles[index];
                double *slot = base + t.slot * lengths[i] + t.c0;
                loops.moments(way.on, t, way.rows, plan.count(t), near + t.c0, scratch<W>(3 * padded(t.c1 - t.c0)), slot,
                              slot + way.columns, slot + 2 * way.columns);
            });
        }
        // Merged in a fixed order (Chan, Golub and LeVeque 1979), as distances from the first shift.
        const long channels = plan.channels, total = x.size() / channels;
        double *__restrict near = out.data(), *__restrict rest = near + channels, *__restrict m2 = rest + channels;
        auto every_slot = [&](auto f) {
            for (int i = 0; i < plan.ways; ++i)
                for (long s = 0; s < plan.way[i].slots; ++s)
                    for (long j = 0; j < plan.way[i].columns; j += channels) {
                        const double *slot = sums + i * wholes[0] + s * lengths[i] + j;
                        f((double)counts[i][s], slot, slot + plan.way[i].columns, slot + 2 * plan.way[i].columns);
                    }
        };
        std::copy(sums, sums + channels, near);
        std::fill(rest, rest + 2 * channels, 0.0);
        every_slot([&](double n, const double *shift, const double *first, const double *) {
            for (long c = 0; c < channels; ++c) rest[c] += (shift[c] - near[c]) * n + first[c];
        });
        for (long c = 0; c < channels; ++c) rest[c] /= (double)total;
        every_slot([&](double n, const double *shift, const double *first, const double *second) {
            const double per = 1 / n;
            for (long c = 0; c < channels; ++c) {
                const double from_shift = first[c] * per, from_mean = (shift[c] - near[c]) + from_shift - rest[c];
                m2[c] += std::max(second[c] - first[c] * from_shift, 0.0) + n * from_mean * from_mean;
            }
        });
        if (!std::is_same_v<T, double>)
            for (long c = 0; c < channels; ++c) near[c] += rest[c];
        return true;
    });
    return done ? x.size() / x.shape[1] : -1;
}

bool normalize(nb::handle x_object, const Vector &mean, const Vector &invstd, nb::handle weight_object,
               nb::handle bias_object, nb::handle residual_object, nb::handle y_object, bool relu, int threads) {
    Array x, weight, bias, residual, y;
    if (!describe(x_object, x) || !describe(weight_object, weight) || !describe(bias_object, bias) ||
        !describe(residual_object, residual) || !describe(y_object, y) || !same_kind(x, {&residual, &y}))
        return false;
    if (x.size() == 0) return true;
    return by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        static thread_local Plan<T> plan;
        if (!plan_for(x, Array{}, residual, y, threads, plan)) return false;
        const auto *all = numbers(plan, mean, invstd, weight, bias, nullptr, nullptr);
        const long stride = padded(plan.way[0].columns);
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        for (int i = 0; i < plan.ways; ++i) {
            const Way<T> &way = plan.way[i];
            each((long)way.tiles.size(), plan.threads, Direction::up, [&](long index) {
                const Tile &t = way.tiles[index];
                loops.normalize(way.on, t, way.rows, plan.stream && i == 0, all + t.c0, stride, residual.data, relu);
            });
        }
        return true;
    });
}

bool backward_reduce(nb::handle dy_object, nb::handle x_object, const Vector &mean, const Vector &invstd,
                     nb::handle weight_object, nb::handle bias_object, nb::handle y_object, nb::handle dz_object,
                     bool relu, const Output &out, int threads) {
    Array dy, x, weight, bias, y, dz;
    if (!describe(dy_object, dy) || !describe(x_object, x) || !describe(weight_object, weight) ||
        !describe(bias_object, bias) || !describe(y_object, y) || !describe(dz_object, dz) || !same_kind(x, {&dy, &y, &dz}))
        return false;
    if (x.size() == 0) {
        std::fill(out.data(), out.data() + out.size(), 0.0);
        return true;
    }
    const Gate gate = y.data ? Gate::saved : relu ? Gate::recomputed : Gate::none;
    return by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        using W = work_of<T>;
        static thread_local Plan<T> plan;
        if (!plan_for(x, dy, y, dz, threads, plan)) return false;
        const auto *all = numbers(plan, mean, invstd, weight, bias, nullptr, nullptr);
        const long stride = padded(plan.way[0].columns), channels = plan.channels;
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        long lengths[2] = {}, wholes[2] = {};
        for (int i = 0; i < plan.ways; ++i) wholes[i] = plan.way[i].slots * (lengths[i] = 2 * plan.way[i].columns);
        static thread_local std::vector<double> memory;
        memory.assign(wholes[0] + wholes[1], 0.0);
        double *const sums = memory.data();
        for (int i = 0; i < plan.ways; ++i) {
            const Way<T> &way = plan.way[i];
            double *const base = sums + i * wholes[0];
            each((long)way.tiles.size(), plan.threads, Direction::down, [&](long index) {
                const Tile &t = way.tiles[index];
                double *slot = base + t.slot * lengths[i] + t.c0;
                loops.reduce(way.on, t, way.rows, gate, all + t.c0, stride,
                                       scratch<W>(3 * padded(t.c1 - t.c0)), slot, slot + way.columns);
            });
        }
        double *__restrict sum_dy = out.data(), *__restrict sum_dy_xmu = sum_dy + channels;
        const double *const means = mean.data();
        std::fill(sum_dy, sum_dy + 2 * channels, 0.0);
        for (int i = 0; i < plan.ways; ++i)
            for (long s = 0; s < plan.way[i].slots; ++s)
                for (long j = 0; j < plan.way[i].columns; j += channels) {
                    const double *slot = sums + i * wholes[0] + s * lengths[i] + j;
                    for (long c = 0; c < channels; ++c) {
                        sum_dy[c] += slot[c];
                        sum_dy_xmu[c] += slot[c + plan.way[i].columns];
                    }
                }
        for (long c = 0; c < channels; ++c)
            sum_dy_xmu[c] -= (means[c] - (double)(W)means[c]) * sum_dy[c];
        return true;
    });
}

bool backward_elementwise(nb::handle dy_object, nb::handle x_object, const Vector &mean, const Vector &invstd,
                          nb::handle weight_object, nb::handle bias_object, const Vector &mean_dy,
                          const Vector &mean_dy_xmu, nb::handle dx_object, bool relu, int threads) {
    Array dy, x, weight, bias, dx;
    if (!describe(dy_object, dy) || !describe(x_object, x) || !describe(weight_object, weight) ||
        !describe(bias_object, bias) || !describe(dx_object, dx) || !same_kind(x, {&dy, &dx}))
        return false;
    if (x.size() == 0) return true;
    return by_dtype(x.dtype, [&](auto type) {
        using T = decltype(type);
        static thread_local Plan<T> plan;
        if (!plan_for(x, dy, Array{}, dx, threads, plan)) return false;
        const auto *all = numbers(plan, mean, invstd, weight, bias, mean_dy.data(), mean_dy_xmu.data());
        const long stride = padded(plan.way[0].columns);
        const auto &loops = best_loops<T>();
        const Unlocked unlocked(x);
        for (int i = 0; i < plan.ways; ++i) {
            const Way<T> &way = plan.way[i];
            each((long)way.tiles.size(), plan.threads, Direction::up, [&](long index) {
                const Tile &t = way.tiles[index];
                loops.elementwise(way.on, t, way.rows, plan.stream && i == 0, all + t.c0, stride, relu);
            });
        }
        return true;
    });
}

#include "cpu_link.h"

}  // namespace

NB_MODULE(_cpu, m) {
    // A communicator lives as long as MPI, longer than the interpreter; nanobind would complain at exit.
    nb::set_leak_warnings(false);
    const auto given = nb::arg();
    const auto maybe = nb::arg().none();  // None, where there is no such array
    nb::class_<Link>(m, "Link")
        .def(
            "__init__",
            [](Link *link, uintptr_t function, uintptr_t comm, uintptr_t datatype, uintptr_t op, intptr_t in_place,
               bool int_handles, int size) {
                new (link) Link{function, comm, datatype, op, (uintptr_t)in_place, int_handles, size, {}};
            })
        .def("sum_moments", &Link::sum_moments)
        .def("sum_vectors", &Link::sum_vectors);
    m.def("update_running_stats", &update_running_stats);
    m.def("invstd", &invstd);
    m.def("fits", &fits, given, maybe, maybe, maybe, maybe);
    m.def("local_moments", &local_moments);
    m.def("normalize", &normalize, given, given, given, maybe, maybe, maybe, given, given, given);
    m.def("backward_reduce", &backward_reduce, given, given, given, given, maybe, maybe, maybe, maybe, given, given, given);
    m.def("backward_elementwise", &backward_elementwise, given, given, given, given, maybe, maybe, given, given, given,
          given, given);
    m.def("instruction_set", [] {
        const char *const names[] = {"baseline", "avx2", "avx512", "avx512 with bfloat16"};
        return names[(int)level()];
    });
    m.def("threads", &default_threads);
    m.def("limit", [](int highest) { highest_level = (Level)highest; });
    m.def("stream_from", [](long bytes) { stream_from = bytes; });
}
