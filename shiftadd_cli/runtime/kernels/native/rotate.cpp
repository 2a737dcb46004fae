// The fast Walsh-Hadamard transform, by additions and one power of two.
#include <cmath>

#include "kernels.h"

namespace shiftadd {
namespace {

// One stage on `order` values: sums and differences of values `half` apart.
inline void butterflies(float* values, int64_t order, int64_t half) {
    for (int64_t start = 0; start < order; start += 2 * half)
        for (int64_t i = start; i < start + half; ++i) {
            const float low = values[i], high = values[i + half];
            values[i] = low + high;
            values[i + half] = low - high;
        }
}

// The first four stages at once: as separate stages they would be short loops that do not fill a register.
inline void sixteen(float* v) {
    for (int half = 1; half < 16; half *= 2) butterflies(v, 16, half);
}

}  // namespace

void rotate(float* row, const float* signs, int64_t columns, int64_t order) {
    for (int64_t i = 0; i < columns; ++i) row[i] *= signs[i];
    int log = 0;
    while ((int64_t{1} << (log + 1)) <= order) ++log;
    const float scale = std::ldexp(1.0f, -(log / 2));
    for (int64_t start = 0; start < columns; start += order) {
        float* block = row + start;
        int64_t half = 1;
        if (order >= 16) {
            for (int64_t i = 0; i < order; i += 16) sixteen(block + i);
            half = 16;
        }
        for (; half < order; half *= 2) butterflies(block, order, half);
        for (int64_t i = 0; i < order; ++i) block[i] *= scale;
    }
}

}  // namespace shiftadd
