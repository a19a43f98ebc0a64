// The loops for processors with AVX2.

#include "levels.h"

#ifdef HAVE_LEVELS
BEGIN_TARGET("avx2,fma,f16c")
namespace mpisyncbn::avx2 {
#define LANES 8
#include "lanes.h"
#include "loops.h"
}  // namespace mpisyncbn::avx2
END_TARGET
#endif
