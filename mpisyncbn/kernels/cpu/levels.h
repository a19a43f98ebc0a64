// The loops are compiled once per instruction set, each in a source file of its own, loops_*.cpp. The
// processor decides at run time which ones serve.

#pragma once

#include "types.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define HAVE_LEVELS
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(t) PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#define VECTOR_WIDTH_FLAG
#else
#define BEGIN_TARGET(t) PRAGMA(GCC push_options) PRAGMA(GCC target(t))
#define END_TARGET PRAGMA(GCC pop_options)
#define VECTOR_WIDTH_FLAG ",prefer-vector-width=512"
#endif
#endif

namespace mpisyncbn {

namespace baseline {
template <class T>
const Loops<T> &loops();
}
namespace avx2 {
template <class T>
const Loops<T> &loops();
}
namespace avx512 {
template <class T>
const Loops<T> &loops();
}
namespace avx512bf16 {  // only for bfloat16: its rounding takes as long as the rest otherwise
template <class T>
const Loops<T> &loops();
}

enum class Level { baseline, avx2, avx512, avx512bf16 };
inline Level highest_level = Level::avx512bf16;  // tests lower it to run the others

inline Level level() {
#ifdef HAVE_LEVELS
    auto has_avx512 = [] {
        return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
    };
    static const Level best =
        has_avx512() ? __builtin_cpu_supports("avx512bf16") ? Level::avx512bf16 : Level::avx512
        : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")  // all of them have F16C too
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
            if constexpr (std::is_same_v<T, bfloat16>) return avx512bf16::loops<T>();
        case Level::avx512: return avx512::loops<T>();
        case Level::avx2: return avx2::loops<T>();
        default: break;
    }
#endif
    return baseline::loops<T>();
}

}  // namespace mpisyncbn
