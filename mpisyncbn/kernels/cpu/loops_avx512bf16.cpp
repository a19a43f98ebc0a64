// The loops for bfloat16 on processors with instructions for it.

#include "levels.h"

#ifdef HAVE_LEVELS
BEGIN_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" VECTOR_WIDTH_FLAG)
namespace mpisyncbn::avx512bf16 {
#define LANES 16
#define BF16_INSTRUCTIONS
#include "lanes.h"
#include "loops.h"
}  // namespace mpisyncbn::avx512bf16
END_TARGET
#endif
