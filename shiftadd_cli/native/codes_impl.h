// Dot products of rows of 8-bit codes with rows of activations, for any instruction set.
#pragma once

#include "kernels.h"

namespace shiftadd {

template <class I>
struct CodesKernel {
    static constexpr int kLanes = I::kLanes;
    using Float = typename I::Float;
    // Codes are prefetched at least kAhead bytes ahead, because rows that are read in parallel are too short for the
    // processor's prefetcher. It handles tiles longer than kLongest bytes, which would not stay in the L1 cache.
    static constexpr int64_t kAhead = 8192, kLongest = 16384;
    // Rows of codes and of activations whose products are summed together, in registers.
    static constexpr int kRows = 4, kBatch = I::kRegisters >= 32 ? 4 : 2;

    template <int R, int B>
    static inline void tile(const Codes& c, int64_t row, int64_t batch) {
        const int8_t* codes = c.codes + row * c.columns;
        // The codes that the same step reads in a later tile. More rows of `x` read the same codes, from the cache.
        const int64_t size = R * c.columns, distance = (kAhead + size - 1) / size * size;
        const char* ahead = reinterpret_cast<const char*>(codes) + distance;
        const bool prefetches = batch == 0 && size <= kLongest;
        const float* x = c.x + batch * c.columns;
        Float total[R][B];
        for (auto& row_sums : total)
            for (auto& sum : row_sums) sum = I::zero();
        int64_t column = 0;
        for (; column + kLanes <= c.columns; column += kLanes) {
            if (prefetches) I::prefetch(ahead + R * column);
            Float values[B];
            for (int b = 0; b < B; ++b) values[b] = I::load(x + b * c.columns + column);
            for (int r = 0; r < R; ++r) {
                const Float code = I::load_codes(codes + r * c.columns + column);
                for (int b = 0; b < B; ++b) total[r][b] = I::fma(code, values[b], total[r][b]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) {
                float sum = I::sum(total[r][b]);
                for (int64_t i = column; i < c.columns; ++i)
                    sum += static_cast<float>(codes[r * c.columns + i]) * x[b * c.columns + i];
                c.sums[(batch + b) * c.stride + row + r] = sum;
            }
    }

    template <int R>
    static inline void all_rows(const Codes& c, int64_t row) {
        int64_t batch = 0;
        for (; batch + kBatch <= c.batch; batch += kBatch) tile<R, kBatch>(c, row, batch);
        for (; batch < c.batch; ++batch) tile<R, 1>(c, row, batch);
    }

    static void dot(const Codes& c) {
        int64_t row = 0;
        for (; row + kRows <= c.rows; row += kRows) all_rows<kRows>(c, row);
        for (; row < c.rows; ++row) all_rows<1>(c, row);
    }
};

}  // namespace shiftadd
