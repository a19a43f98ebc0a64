// The loops for any processor.

#include "levels.h"

namespace mpisyncbn::baseline {
#define LANES 4
#include "lanes.h"
#include "loops.h"
}  // namespace mpisyncbn::baseline
