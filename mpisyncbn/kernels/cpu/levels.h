// The loops, compiled once per instruction set. The processor decides at run time which ones serve.
// Part of module.cpp.

namespace baseline {
#define LANES 4
#include "lanes.h"
#include "loops.h"
#undef LANES
}  // namespace baseline

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

BEGIN_TARGET("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#include "lanes.h"
#include "loops.h"
#undef LANES
}  // namespace avx2
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" VECTOR_WIDTH_FLAG)
namespace avx512 {
#define LANES 16
#include "lanes.h"
#include "loops.h"
#undef LANES
}  // namespace avx512
END_TARGET

BEGIN_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" VECTOR_WIDTH_FLAG)
namespace avx512bf16 {  // only for bfloat16: its rounding takes as long as the rest otherwise
#define LANES 16
#define BF16_INSTRUCTIONS
#include "lanes.h"
#include "loops.h"
#undef BF16_INSTRUCTIONS
#undef LANES
}  // namespace avx512bf16
END_TARGET
#endif

enum class Level { baseline, avx2, avx512, avx512bf16 };
Level highest_level = Level::avx512bf16;  // tests lower it to run the others

Level level() {
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
            if constexpr (std::is_same_v<T, bfloat16>) return avx512bf16::loops<T>;
        case Level::avx512: return avx512::loops<T>;
        case Level::avx2: return avx2::loops<T>;
        default: break;
    }
#endif
    return baseline::loops<T>;
}
