// Columns of a matrix settle on levels one after the other, each correcting those that come after it, over the
// operations of an instruction set. Rows do not depend on each other: so many as fill two registers go side by side.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace shiftadd {

template <class I>
struct SettleKernel {
    static constexpr int kLanes = I::kLanes, kRows = 2 * kLanes;

    // Nearest of ascending levels, a weight on a midpoint to the lower one: their values, and their places.
    static inline void nearest(const Stretch& s, int64_t column, int64_t row, int count, const float* goal, float* value,
                               uint8_t* ranks) {
        const int64_t at = s.groups[column] * s.rows + row, step = s.group_count * s.rows;
        const float *level = s.levels + at, *midpoint = s.midpoints + at;
        int32_t rank[kRows] = {};
        for (int i = 0; i < count; ++i) value[i] = level[i];
        for (int64_t above = 1; above < s.level_count; ++above, midpoint += step) {
            level += step;
            for (int i = 0; i < count; ++i) {
                const bool over = goal[i] > midpoint[i];
                value[i] = over ? level[i] : value[i];
                rank[i] += over;
            }
        }
        for (int i = 0; i < count; ++i) ranks[i] = static_cast<uint8_t>(rank[i]);
    }

    // Rows from `row` on; `count` is kRows but at the end of the matrix.
    static inline void settle(const Stretch& s, int64_t row, int count, float* room) {
        for (int64_t column = 0; column < s.columns; ++column) {
            float* local = room + column * kRows;
            if (count < kRows) std::memset(local, 0, kRows * sizeof(float));
            std::memcpy(local, s.goals + column * s.rows + row, count * sizeof(float));
        }
        for (int64_t column = 0; column < s.columns; ++column) {
            const float* coupling = s.coupling + column * s.coupling_stride;
            const float* local = room + column * kRows;
            const float diagonal = coupling[column];
            const int64_t at = column * s.rows + row;
            float value[kRows];
            alignas(64) float step[kRows] = {};
            if (s.descend) {
                float goal[kRows], *values = s.values + at;
                for (int i = 0; i < count; ++i) goal[i] = values[i] + local[i] / diagonal;
                nearest(s, column, row, count, goal, value, s.ranks + at);
                for (int i = 0; i < count; ++i) step[i] = value[i] - values[i];
            } else {
                nearest(s, column, row, count, local, value, s.ranks + at);
                for (int i = 0; i < count; ++i) step[i] = (local[i] - value[i]) / diagonal;
            }
            std::memcpy(s.values + at, value, count * sizeof(float));
            std::memcpy(s.steps + at, step, count * sizeof(float));
            bool any = false;
            for (int i = 0; i < kRows; ++i) any |= step[i] != 0;
            if (!any) continue;
            const auto low = I::load(step), high = I::load(step + kLanes);
            for (int64_t later = column + 1; later < s.columns; ++later) {
                float* to = room + later * kRows;
                const auto factor = I::set(-coupling[later]);
                I::store(to, I::fma(factor, low, I::load(to)));
                I::store(to + kLanes, I::fma(factor, high, I::load(to + kLanes)));
            }
        }
    }

    static void strip(const Stretch& s, int64_t number, float* room) {
        const int64_t row = number * kRows;
        // A constant count makes the loops over rows registers.
        if (row + kRows <= s.rows) settle(s, row, kRows, room);
        else settle(s, row, static_cast<int>(s.rows - row), room);
    }
};

}  // namespace shiftadd
