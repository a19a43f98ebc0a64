// The loops of the four kernels over a tile. Included once per instruction set, after lanes.h:
// see levels.h.
//
// Values lie in memory in one of two ways. In planes, the positions of one channel of one sample
// lie side by side. In rows, the channels of one position lie side by side.

#include "activation.h"
#include "terms.h"

// Goes through `planes` planes of `length` values, which follow each other in memory. A plane has at
// least two vectors. (Shorter planes have a loop of their own.) Vectors are aligned in the array at
// `from`, because loads and stores that cross into the next cache line are slow, and stores past the
// cache need whole lines. Calls
//     inside(i, n, c) for n vectors within plane c, from the i-th value on,
//     across(i, c, n) for a vector with the last n values of plane c and the first ones of c + 1,
//     part(i, n, c) for n values within plane c, fewer than a vector,
//     end(c) after the last value of plane c, unless that was in a vector across.
template <class T, class P, class Inside, class Across, class Piece, class End>
INLINE void go_through(const P *from, long planes, long length, Inside inside, Across across, Piece part,
                       End end) {
    constexpr long W = Lane<T>::width;
    const long total = planes * length, ahead = (long)(-(uintptr_t)from % (W * sizeof(T)) / sizeof(T));
    long i = 0;
    long c = 0, left = length;  // values of plane c
    if (ahead) {
        part(0, ahead, 0);
        i = ahead, left -= ahead;
    }
    for (; i + W <= total; ++c) {
        const long n = left / W;
        if (n) inside(i, n, c);
        i += n * W, left -= n * W;
        if (left && i + W > total) break;
        if (left) {
            across(i, c, left);
            i += W, left += length - W;
        } else {
            end(c);
            left = length;
        }
    }
    if (i < total) {  // the end of the last plane
        part(i, total - i, c);
        end(c);
    }
}

#include "sums.h"
#include "moments.h"
#include "passes.h"

template <class T>
const Loops<T> &loops() {
    static const Loops<T> all = {row_origins<T>, tile_moments<T>, tile_reduce<T>, tile_normalize<T>,
                                 tile_elementwise<T>};
    return all;
}

template const Loops<bfloat16> &loops<bfloat16>();
#ifndef BF16_INSTRUCTIONS
template const Loops<float16> &loops<float16>();
template const Loops<float> &loops<float>();
template const Loops<double> &loops<double>();
#endif
