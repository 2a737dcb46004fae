#include "solver_checks.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../moments.h"
#include "../settle.h"
#include "buffer.h"

namespace shiftadd::check {
namespace {

// For sums of squares, whose terms do not cancel: rounding grows with the root of their number, times the present sum.
constexpr double kMomentRoundings = 4 * kExactRoundings;

// Columns to quantize. No gap follows the last row of the coupling.
struct Columns {
    Buffer<float> goals, coupling, before;
    Buffer<int64_t> groups;

    Columns(int64_t columns, int64_t rows, int64_t stride, int64_t group_count, Random& random)
        : goals(columns * rows), coupling((columns - 1) * stride + columns), before(columns * rows), groups(columns) {
        for (int64_t i = 0; i < goals.size(); ++i) {
            goals[i] = static_cast<float>(random.normal());
            before[i] = static_cast<float>(random.normal());
        }
        for (int64_t i = 0; i < coupling.size(); ++i) coupling[i] = static_cast<float>(0.05 * random.normal());
        for (int64_t i = 0; i < columns; ++i) {
            coupling[i * stride + i] = static_cast<float>(0.5 + random.uniform());
            groups[i] = random.between(0, group_count - 1);
        }
    }
};

// The least squared error of a path of `rows` levels [rows][2^planes] to goals, in double.
double least_error(const TrellisCode& code, const double* goals, const float* levels, int64_t rows) {
    std::vector<double> costs(kTrellisStates, 1e300), next(kTrellisStates);
    costs[0] = 0;
    for (int64_t row = 0; row < rows; ++row) {
        std::fill(next.begin(), next.end(), 1e300);
        for (int state = 0; state < kTrellisStates; ++state)
            for (int stored = 0; stored < 1 << code.bits; ++stored) {
                const unsigned reg = static_cast<unsigned>(state << code.bits | stored);
                int label = 0;
                for (int plane = 0; plane < code.planes; ++plane)
                    label |= std::popcount(reg & code.masks[plane]) % 2 << plane;
                const double difference = goals[row] - levels[(row << code.planes) + label];
                double& cost = next[reg % kTrellisStates];
                cost = std::min(cost, costs[state] + difference * difference);
            }
        costs.swap(next);
    }
    return *std::min_element(costs.begin(), costs.end());
}

}  // namespace

void check_moments(const Kernels& kernels, Random& random, bool quick, Tally& tally) {
    for (int turn = 0; turn < (quick ? 24 : 120); ++turn) {
        // In some turns, more tokens than are summed in one pass, or an odd number of them.
        const int64_t columns = random.between(1, 110), tokens = random.between(1, turn % 3 ? 60 : 1200);
        const Number type = turn % 2 ? Number::kFloat32 : Number::kBFloat16;
        const bool crossed = random.coin(), weighted = turn % 4 > 1;
        describe(std::string(kernels.name) + " moments of " + std::to_string(tokens) + " x " + std::to_string(columns));
        Numbers x(type, tokens * columns), other(type, tokens * columns);
        Buffer<float> roots(tokens), hessian(columns * columns), cross(columns * columns);
        for (int64_t i = 0; i < x.size(); ++i) {
            x.set(i, static_cast<float>(random.normal()));
            other.set(i, static_cast<float>(random.normal()));
        }
        for (int64_t t = 0; t < tokens; ++t) roots[t] = static_cast<float>(random.uniform());
        for (int64_t i = 0; i < hessian.size(); ++i) hessian[i] = cross[i] = static_cast<float>(random.normal());
        Buffer<float> sums[2][2];
        for (auto& pair : sums)
            for (auto& sum : pair) {
                sum = Buffer<float>(columns * columns);
                std::memcpy(sum.data(), (&sum == &pair[0] ? hessian : cross).data(), sum.size() * sizeof(float));
            }
        for (int i = 0; i < 2; ++i)
            add_moments(kernels, {x.data(), type, columns, weighted ? roots.data() : nullptr, 0, tokens},
                        crossed ? other.data() : nullptr, sums[i][0].data(), crossed ? sums[i][1].data() : nullptr,
                        i ? kThreads : 1);
        bool right = true;
        const auto compare = [&](const Buffer<float>& result, const Buffer<float>& before, const Numbers& left,
                                 int64_t i, int64_t j) {
            double expected = before[i * columns + j], size = std::fabs(expected);
            for (int64_t t = 0; t < tokens; ++t) {
                const double root = weighted ? roots[t] : 1;
                const double term = root * left.get(t * columns + i) * root * x.get(t * columns + j);
                expected += term;
                size += std::fabs(term);
            }
            right = right && std::fabs(result[i * columns + j] - expected) <= kMomentRoundings * kFloatRounding * size;
        };
        for (int64_t i = 0; i < columns; ++i)
            for (int64_t j = 0; j < columns; ++j) {
                if (i <= j) compare(sums[0][0], hessian, x, i, j);
                if (crossed) compare(sums[0][1], cross, other, i, j);
            }
        tally.expect(right, described());
        tally.expect(sums[0][0] == sums[1][0] && sums[0][1] == sums[1][1],
                     described() + ": other bits on more threads");
    }
}

void check_settle(const Kernels& kernels, Random& random, Tally& tally) {
    for (int turn = 0; turn < 60; ++turn) {
        const int64_t columns = random.between(1, 140), rows = random.between(1, 100), groups = random.between(1, 3);
        const int64_t count = random.between(2, 20), stride = columns + random.between(0, 9), size = columns * rows;
        const bool descend = turn % 2;
        describe(std::string(kernels.name) + (descend ? " descent" : " sweep") + " of " + std::to_string(columns) +
                 " columns x " + std::to_string(rows));
        const Columns given(columns, rows, stride, groups, random);
        const auto &[goals, coupling, before, of_column] = given;
        Buffer<float> levels(count * groups * rows), midpoints((count - 1) * groups * rows);
        const int64_t above = groups * rows;
        for (int64_t i = 0; i < levels.size(); ++i)
            levels[i] = i < above ? static_cast<float>(-2 * random.uniform())
                                  : levels[i - above] + static_cast<float>(random.uniform());
        for (int64_t i = 0; i < midpoints.size(); ++i) midpoints[i] = (levels[i] + levels[i + above]) / 2;
        Buffer<float> values[2], steps[2];
        Buffer<uint8_t> ranks[2];
        for (int i = 0; i < 2; ++i) {
            values[i] = Buffer<float>(size), steps[i] = Buffer<float>(size), ranks[i] = Buffer<uint8_t>(size);
            if (descend) std::memcpy(values[i].data(), before.data(), size * sizeof(float));
            settle(kernels,
                   {descend, columns, rows, goals.data(), coupling.data(), stride, of_column.data(), values[i].data(),
                    ranks[i].data(), steps[i].data()},
                   LevelTables{levels.data(), midpoints.data(), count, groups}, i ? kThreads : 1);
        }
        bool right = true;
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < columns; ++i) {
                const int64_t at = i * rows + row;
                const double diagonal = coupling[i * stride + i];
                double goal = goals[at];
                // Uses the steps that were written, so that an error does not grow from column to column.
                for (int64_t j = 0; j < i; ++j) goal -= coupling[j * stride + i] * double{steps[0][j * rows + row]};
                if (descend) goal = before[at] + goal / diagonal;
                const double value = values[0][at], step = descend ? value - before[at] : (goal - value) / diagonal;
                double nearest = 1e300;
                for (int64_t k = 0; k < count; ++k)
                    nearest = std::min(nearest, std::fabs(goal - levels[(k * groups + of_column[i]) * rows + row]));
                right = right && values[0][at] == levels[(ranks[0][at] * groups + of_column[i]) * rows + row] &&
                        std::fabs(steps[0][at] - step) <= 1e-4 && std::fabs(goal - value) <= nearest + 1e-4;
            }
        tally.expect(right, described());
        tally.expect(values[0] == values[1] && steps[0] == steps[1] && ranks[0] == ranks[1],
                     described() + ": other bits on more threads");
    }
}

void check_paths(const Kernels& kernels, Random& random, bool quick, Tally& tally) {
    for (int turn = 0; turn < (quick ? 20 : 80); ++turn) {
        TrellisCode code{static_cast<int>(random.between(1, 4)), static_cast<int>(random.between(1, 6)), {}};
        for (auto& mask : code.masks)
            mask = static_cast<uint16_t>(random.between(1, (kTrellisStates << code.bits) - 1));
        const int64_t columns = random.between(1, 8), rows = random.between(1, 90), groups = random.between(1, 3);
        const int64_t stripe = random.between(1, 60), stride = columns + random.between(0, 5), size = columns * rows;
        const bool descend = turn % 2;
        describe(std::string(kernels.name) + " paths of " + std::to_string(code.bits) + " bits and " +
                 std::to_string(code.planes) + " planes through " + std::to_string(rows) + " rows");
        const Columns given(columns, rows, stride, groups, random);
        const auto &[goals, coupling, before, of_column] = given;
        Buffer<float> levels(groups * rows << code.planes);
        for (int64_t i = 0; i < levels.size(); ++i) levels[i] = static_cast<float>(random.normal());
        Buffer<float> values[2], steps[2];
        Buffer<uint8_t> stored[2];
        for (int i = 0; i < 2; ++i) {
            values[i] = Buffer<float>(size), steps[i] = Buffer<float>(size), stored[i] = Buffer<uint8_t>(size);
            if (descend) std::memcpy(values[i].data(), before.data(), size * sizeof(float));
            settle(kernels,
                   {descend, columns, rows, goals.data(), coupling.data(), stride, of_column.data(), values[i].data(),
                    stored[i].data(), steps[i].data()},
                   Paths{code, stripe, levels.data()}, i ? kThreads : 1);
        }
        bool right = true;
        for (int64_t i = 0; i < columns; ++i) {
            std::vector<double> targets(rows);
            for (int64_t row = 0; row < rows; ++row) {
                const double diagonal = coupling[i * stride + i];
                double goal = goals[i * rows + row];
                for (int64_t j = 0; j < i; ++j) goal -= coupling[j * stride + i] * double{steps[0][j * rows + row]};
                targets[row] = descend ? before[i * rows + row] + goal / diagonal : goal;
            }
            for (int64_t first = 0; first < rows; first += stripe) {
                const int64_t count = std::min(stripe, rows - first);
                const float* choices = levels.data() + ((of_column[i] * rows + first) << code.planes);
                double error = 0;
                for (int64_t row = first; row < first + count; ++row) {
                    const double difference = targets[row] - values[0][i * rows + row];
                    error += difference * difference;
                    right = right && stored[0][i * rows + row] < 1 << code.bits;
                }
                const double least = least_error(code, targets.data() + first, choices, count);
                right = right && error <= least * (1 + 1e-4) + 1e-4 && error >= least * (1 - 1e-4) - 1e-4;
            }
        }
        tally.expect(right, described());
        tally.expect(values[0] == values[1] && steps[0] == steps[1] && stored[0] == stored[1],
                     described() + ": other bits on more threads");
    }
}

}  // namespace shiftadd::check
