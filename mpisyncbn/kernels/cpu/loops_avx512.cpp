// The loops for processors with AVX-512.

#include "levels.h"

#ifdef HAVE_LEVELS
BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" VECTOR_WIDTH_FLAG)
namespace mpisyncbn::avx512 {
#define LANES 16
#include "lanes.h"
#include "loops.h"
}  // namespace mpisyncbn::avx512
END_TARGET
#endif
