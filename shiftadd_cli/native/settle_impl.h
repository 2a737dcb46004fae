// Rounds the columns of a matrix to levels one after another, where each column corrects the later ones, for any
// instruction set. Rows are independent: the rows of a strip fill two registers and are processed together. Their goals
// are first copied to
//
//     room    float32 [column][kRows]
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace shiftadd {

template <class I>
struct SettleKernel {
    static constexpr int kLanes = I::kLanes, kParts = 2, kRows = kParts * kLanes;
    using Float = typename I::Float;

    // A strip of rows of a matrix [columns][rows]. If it has fewer than kRows, its last row fills the other lanes.
    struct Rows {
        const float* from;
        int count;

        Float part(int number) const {
            if (count == kRows) return I::load(from + number * kLanes);
            float lanes[kLanes];
            for (int i = 0; i < kLanes; ++i) lanes[i] = from[std::min(number * kLanes + i, count - 1)];
            return I::load(lanes);
        }
    };

    static inline void store(Float low, Float high, int count, float* to) {
        if (count == kRows) {
            I::store(to, low);
            I::store(to + kLanes, high);
            return;
        }
        float lanes[kRows];
        I::store(lanes, low);
        I::store(lanes + kLanes, high);
        std::memcpy(to, lanes, count * sizeof(float));
    }

    // The values and ranks of the levels nearest to the goals; a goal on a midpoint takes the lower level.
    static inline void nearest(const Stretch& s, const LevelTables& tables, int64_t column, int64_t row, int count,
                               const Float (&goal)[kParts], Float (&value)[kParts]) {
        const int64_t at = s.groups[column] * s.rows + row, step = tables.group_count * s.rows;
        Float rank[kParts];
        for (int part = 0; part < kParts; ++part) {
            value[part] = Rows{tables.levels + at, count}.part(part);
            rank[part] = I::zero();
        }
        for (int64_t above = 1; above < tables.level_count; ++above) {
            const Rows level{tables.levels + at + above * step, count};
            const Rows midpoint{tables.midpoints + at + (above - 1) * step, count};
            const Float level_rank = I::set(static_cast<float>(above));
            for (int part = 0; part < kParts; ++part) {
                const Float bound = midpoint.part(part);
                value[part] = I::if_above(goal[part], bound, level.part(part), value[part]);
                rank[part] = I::if_above(goal[part], bound, level_rank, rank[part]);
            }
        }
        float rank_values[kRows];
        store(rank[0], rank[1], kRows, rank_values);
        uint8_t* ranks = s.codes + column * s.rows + row;
        for (int i = 0; i < count; ++i) ranks[i] = static_cast<uint8_t>(rank_values[i]);
    }

    static void strip(const Stretch& s, const LevelTables& tables, int64_t number, float* room) {
        const int64_t row = number * kRows;
        const int count = static_cast<int>(std::min<int64_t>(kRows, s.rows - row));
        for (int64_t column = 0; column < s.columns; ++column) {
            const Rows goals{s.goals + column * s.rows + row, count};
            for (int part = 0; part < kParts; ++part) I::store(room + column * kRows + part * kLanes, goals.part(part));
        }
        for (int64_t column = 0; column < s.columns; ++column) {
            const float* coupling = s.coupling + column * s.coupling_stride;
            const int64_t at = column * s.rows + row;
            const Float inverse = I::set(1.0f / coupling[column]), minus = I::set(-1.0f);
            Float goal[kParts], value[kParts], step[kParts];
            for (int part = 0; part < kParts; ++part) goal[part] = I::load(room + column * kRows + part * kLanes);
            if (s.descend) {
                const Rows values{s.values + at, count};
                Float before[kParts];
                for (int part = 0; part < kParts; ++part) {
                    before[part] = values.part(part);
                    goal[part] = I::fma(goal[part], inverse, before[part]);
                }
                nearest(s, tables, column, row, count, goal, value);
                for (int part = 0; part < kParts; ++part) step[part] = I::fma(before[part], minus, value[part]);
            } else {
                nearest(s, tables, column, row, count, goal, value);
                for (int part = 0; part < kParts; ++part)
                    step[part] = I::mul(I::fma(value[part], minus, goal[part]), inverse);
            }
            store(value[0], value[1], count, s.values + at);
            store(step[0], step[1], count, s.steps + at);
            // Near the end of a descent almost no value changes.
            static constexpr float kNone[kRows] = {};
            if (std::memcmp(s.steps + at, kNone, count * sizeof(float)) == 0) continue;
            for (int64_t later = column + 1; later < s.columns; ++later) {
                float* to = room + later * kRows;
                const Float factor = I::set(-coupling[later]);
                for (int part = 0; part < kParts; ++part)
                    I::store(to + part * kLanes, I::fma(factor, step[part], I::load(to + part * kLanes)));
            }
        }
    }
};

}  // namespace shiftadd
