// Encodes the columns of a matrix in a trellis code one after another, where each column corrects the later ones, for
// any instruction set. See shiftadd_cli/bcq/primitives/trellis/code.py for the code. The rows of a stripe are one path
// through the trellis, which the Viterbi algorithm (Viterbi 1967) finds; stripes are independent.
//
// The register of a row is branch << 6 | state: its low 6 bits are the state after the row, and the state before it is
// register >> bits. Labels, the numbers of levels, are parities of the register, so
//
//     label(branch, state) = label(branch << 6) ^ label(state)
//
// The lanes of a cost register are consecutive states. Their labels are the same kLanes numbers up to one exclusive-or,
// so the errors of all labels are permuted into `spread` once per row, for each possible value of that exclusive-or.
// Working memory of a stripe:
//
//     goals      float32 [column][padded rows], and the steps of a column
//     levels     float32 [row][16], of one group, if a code has fewer labels: whole registers can be loaded
//     decisions  uint64  [row][2^bits - 1]     bit s: this branch into state s beats all lower ones
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "numbers.h"

namespace shiftadd {

template <class I>
struct ViterbiKernel {
    static constexpr int kLanes = I::kLanes, kParts = kTrellisStates / kLanes;
    using Float = typename I::Float;

    static int label(const TrellisCode& code, int reg) {
        int result = 0;
        for (int plane = 0; plane < code.planes; ++plane)
            result |= (__builtin_popcount(reg & code.masks[plane]) & 1) << plane;
        return result;
    }

    // What the search needs of a code of `Bits` bits, in the order in which it is read.
    template <int Bits>
    struct Trellis {
        static constexpr int kBranches = 1 << Bits, kRegisters = kTrellisStates << Bits;
        static constexpr int kMostLabels = 1 << kMostTrellisPlanes, kTable = 16;
        int labels, width;  // labels, and their number in a row of levels
        uint8_t label_of[kRegisters];
        // By part of the states and branch: where its errors are in `spread`.
        int first_label[kParts][kBranches];
        // By exclusive-or: the label of each lane, and the number of its table of 16 labels.
        alignas(64) uint32_t lane_labels[kMostLabels][kLanes];
        alignas(64) float lane_tables[kMostLabels][kLanes];

        explicit Trellis(const TrellisCode& code) : labels(1 << code.planes), width(std::max(labels, kTable)) {
            for (int reg = 0; reg < kRegisters; ++reg) label_of[reg] = static_cast<uint8_t>(label(code, reg));
            for (int part = 0; part < kParts; ++part)
                for (int branch = 0; branch < kBranches; ++branch)
                    first_label[part][branch] = label_of[branch << kTrellisMemory | part * kLanes];
            for (int first = 0; first < labels; ++first)
                for (int lane = 0; lane < kLanes; ++lane) {
                    lane_labels[first][lane] = label_of[lane] ^ first;
                    lane_tables[first][lane] = static_cast<float>((label_of[lane] ^ first) / kTable);
                }
        }
    };

    // The squared errors of all labels, as lanes of states see them: spread[first label][lane].
    template <int Bits>
    static inline void spread_errors(const Trellis<Bits>& trellis, float goal, const float* levels, float* spread) {
        using T = Trellis<Bits>;
        alignas(64) float errors[std::max(T::kMostLabels, T::kTable)];
        const Float minus = I::set(-1.0f), target = I::set(goal);
        for (int at = 0; at < trellis.width; at += kLanes) {
            const Float difference = I::add(target, I::mul(I::load(levels + at), minus));
            I::store(errors + at, I::mul(difference, difference));
        }
        if (trellis.labels <= T::kTable) {
            const auto table = I::load_table(errors);
            for (int first = 0; first < trellis.labels; ++first)
                I::store(spread + first * kLanes, I::look_up(table, I::load_words(trellis.lane_labels[first])));
            return;
        }
        for (int first = 0; first < trellis.labels; ++first) {
            const auto index = I::load_words(trellis.lane_labels[first]);
            const Float number = I::load(trellis.lane_tables[first]);
            Float result = I::look_up(I::load_table(errors), index);
            for (int table = 1; table < trellis.labels / T::kTable; ++table)
                result = I::if_above(number, I::set(table - 0.5f),
                                     I::look_up(I::load_table(errors + table * T::kTable), index), result);
            I::store(spread + first * kLanes, result);
        }
    }

    // The path with the least squared error: stored bits and values of `count` rows. levels: [count][width].
    template <int Bits>
    static void search(const Trellis<Bits>& trellis, const float* goals, const float* levels, int count,
                       uint64_t* decisions, uint8_t* stored, float* values) {
        using T = Trellis<Bits>;
        constexpr int kChoices = T::kBranches - 1, kRemembered = kTrellisMemory - Bits;
        alignas(64) float costs[2][kTrellisStates], spread[T::kMostLabels * kLanes];
        std::fill(costs[0], costs[0] + kTrellisStates, std::numeric_limits<float>::infinity());
        costs[0][0] = 0;
        for (int row = 0; row < count; ++row) {
            const float* before = costs[row % 2];
            float* after = costs[(row + 1) % 2];
            spread_errors<Bits>(trellis, goals[row], levels + row * trellis.width, spread);
            uint64_t better[kChoices] = {};
            for (int part = 0; part < kParts; ++part) {
                const float* from = before + (part * kLanes >> Bits);
                Float best = I::add(I::template repeat<T::kBranches>(from),
                                    I::load(spread + trellis.first_label[part][0] * kLanes));
                for (int branch = 1; branch < T::kBranches; ++branch) {
                    const Float cost = I::add(I::template repeat<T::kBranches>(from + (branch << kRemembered)),
                                              I::load(spread + trellis.first_label[part][branch] * kLanes));
                    better[branch - 1] |= static_cast<uint64_t>(I::below(cost, best)) << (part * kLanes);
                    best = I::least(cost, best);
                }
                I::store(after + part * kLanes, best);
            }
            std::memcpy(decisions + row * kChoices, better, sizeof(better));
        }
        const float* last = costs[count % 2];
        int state = static_cast<int>(std::min_element(last, last + kTrellisStates) - last);
        for (int row = count - 1; row >= 0; --row) {
            const uint64_t* better = decisions + row * kChoices;
            int branch = 0;
            for (int choice = 0; choice < kChoices; ++choice)
                branch = better[choice] >> state & 1 ? choice + 1 : branch;
            stored[row] = static_cast<uint8_t>(state & (T::kBranches - 1));
            values[row] = levels[row * trellis.width + trellis.label_of[branch << kTrellisMemory | state]];
            state = state >> Bits | branch << kRemembered;
        }
    }

    template <int Bits>
    static void encode(const Stretch& s, const Paths& paths, int64_t number, PathScratch& scratch) {
        const Trellis<Bits> trellis(paths.code);
        const int64_t first = number * paths.stripe;
        const int count = static_cast<int>(std::min(paths.stripe, s.rows - first));
        const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
        float* goals = scratch.goals.room<float>((s.columns + 1) * padded);
        float* steps = goals + s.columns * padded;
        const bool narrow = trellis.labels < trellis.width;
        float* wide = narrow ? scratch.levels.room<float>(count * trellis.width) : nullptr;
        int64_t wide_group = -1;
        uint64_t* decisions = scratch.decisions.room<uint64_t>(count * (Trellis<Bits>::kBranches - 1));
        std::fill(goals, steps + padded, 0.0f);
        for (int64_t column = 0; column < s.columns; ++column)
            std::memcpy(goals + column * padded, s.goals + column * s.rows + first, count * sizeof(float));
        for (int64_t column = 0; column < s.columns; ++column) {
            const float* coupling = s.coupling + column * s.coupling_stride;
            const float* levels = paths.levels + (s.groups[column] * s.rows + first) * trellis.labels;
            if (narrow && wide_group != s.groups[column]) {
                wide_group = s.groups[column];
                std::fill(wide, wide + count * trellis.width, 0.0f);
                for (int row = 0; row < count; ++row)
                    std::memcpy(wide + row * trellis.width, levels + row * trellis.labels,
                                trellis.labels * sizeof(float));
            }
            float* goal = goals + column * padded;
            float* values = s.values + column * s.rows + first;
            const float inverse = 1.0f / coupling[column];
            if (s.descend) {
                std::memcpy(steps, values, count * sizeof(float));
                for (int row = 0; row < count; ++row) goal[row] = values[row] + goal[row] * inverse;
            }
            search<Bits>(trellis, goal, narrow ? wide : levels, count, decisions, s.codes + column * s.rows + first,
                         values);
            if (s.descend)
                for (int row = 0; row < count; ++row) steps[row] = values[row] - steps[row];
            else
                for (int row = 0; row < count; ++row) steps[row] = (goal[row] - values[row]) * inverse;
            std::memcpy(s.steps + column * s.rows + first, steps, count * sizeof(float));
            if (std::all_of(steps, steps + count, [](float step) { return step == 0; })) continue;
            for (int64_t later = column + 1; later < s.columns; ++later) {
                if (coupling[later] == 0) continue;
                const Float factor = I::set(-coupling[later]);
                float* to = goals + later * padded;
                for (int64_t row = 0; row < padded; row += kLanes)
                    I::store(to + row, I::fma(factor, I::load(steps + row), I::load(to + row)));
            }
        }
    }

    static void stripe(const Stretch& s, const Paths& paths, int64_t number, PathScratch& scratch) {
        switch (paths.code.bits) {
            case 1: return encode<1>(s, paths, number, scratch);
            case 2: return encode<2>(s, paths, number, scratch);
            case 3: return encode<3>(s, paths, number, scratch);
            case 4: return encode<4>(s, paths, number, scratch);
        }
    }
};

}  // namespace shiftadd
