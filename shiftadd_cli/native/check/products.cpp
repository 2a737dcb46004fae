#include "products.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "../pack.h"
#include "../pool.h"

namespace shiftadd::check {
namespace {

constexpr double kFastError = 2e-3;
// Equal numbers are rounded the same way every time, so their roundings add up instead of averaging out.
constexpr double kEqualFastError = 3e-3;

// Whether a product is right, except for row `skip` of the batch.
bool is_right(const Problem& problem, const Expected& expected, const Numbers& output, bool fast, Tally& tally,
              int64_t skip = -1) {
    const bool rounded = problem.shape.type == Number::kBFloat16;
    const bool equal = problem.values == Values::kEqual;
    const double most_roundings = kExactRoundings + (equal ? static_cast<double>(problem.shape.columns) : 0);
    bool right = true;
    double errors = 0;
    for (int64_t i = 0; i < output.size(); ++i) {
        if (i / problem.shape.rows == skip) continue;
        const double value = output.get(i), error = std::fabs(value - expected.values[i]);
        errors += error * error;
        // NaN must fail, so the comparisons test for right values, not for wrong ones.
        if (fast) continue;
        const double last = rounded ? kBFloat16Rounding * std::fabs(expected.values[i]) : 0;
        const double unit = kFloatRounding * expected.sizes[i] * (1 + (rounded ? kBFloat16Rounding : 0));
        const double roundings = std::max(0.0, error - last) / (unit + DBL_MIN);
        if (!(roundings <= most_roundings)) right = false;
        if (!equal) tally.roundings = std::max(tally.roundings, roundings);
    }
    if (!fast) return right;
    double values = 0;
    for (double value : expected.values) values += value * value;
    // Outputs in bfloat16 are rounded, and so are inputs after a rotation.
    const double roundings = rounded ? kBFloat16Rounding * (problem.shape.signs ? 1.5 : 1) : 0;
    const double allowed = (equal ? kEqualFastError : kFastError) * expected.norm +
                           roundings * std::max(std::sqrt(values), expected.norm);
    if (!rounded && !equal && expected.norm > 0)
        tally.fast_error = std::max(tally.fast_error, std::sqrt(errors) / expected.norm);
    return std::sqrt(errors) <= allowed + 1e-30;
}

}  // namespace

Numbers product(const Kernels& kernels, const Problem& problem, Way way, int threads) {
    Numbers output(problem.shape.type, problem.shape.batch * problem.shape.rows);
    linear(kernels, problem.matrix(), problem.activations(), output.data(), way.fast, way.method, threads);
    return output;
}

void check_packing(const Problem& problem, Tally& tally) {
    describe("packing " + problem.name());
    const Layout& layout = problem.layout;
    const int64_t row_bytes = (layout.columns + 7) / 8, last = layout.columns - 8 * (row_bytes - 1);
    Buffer<uint8_t> codes(problem.codes.size());
    Pool::shared().run(layout.stripes(), 3, [&](int64_t stripe) {
        unpack_stripe(layout, problem.words.data(), codes.data(), stripe);
    });
    bool same = true;
    int64_t ones = 0, stored = 0;
    for (int64_t i = 0; i < codes.size(); ++i) {
        const int mask = i % row_bytes == row_bytes - 1 ? (1 << last) - 1 : 255;
        same = same && codes[i] == (problem.codes[i] & mask);
        ones += std::popcount(static_cast<unsigned>(problem.codes[i] & mask));
    }
    for (int64_t i = 0; i < problem.words.size(); ++i) stored += std::popcount(problem.words[i]);
    tally.expect(same, described() + ": unpacked planes differ");
    tally.expect(ones == stored, described() + ": padding is not zero");
}

void check_products(const Kernels& kernels, const Problem& problem, const Expected& expected, Tally& tally) {
    static int turn = 0;
    for (Way way : kWays) {
        const std::string name = std::string(kernels.name) + " " + way.name() + ", " + problem.name();
        describe(name);
        const Numbers alone = product(kernels, problem, way, 1);
        tally.expect(is_right(problem, expected, alone, way.fast, tally), name);
        const int threads = 2 + turn++ % (kThreads - 1);
        const Numbers together = product(kernels, problem, way, threads);
        tally.expect(together == alone, name + ": other bits on " + std::to_string(threads) + " threads");
    }
}

void check_not_finite(const Kernels& kernels, Random& random, Tally& tally) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (float value : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(), FLT_MAX, -FLT_MAX})
        for (int turn = 0; turn < 4; ++turn) {
            const Shape shape{random.between(1, 150), random.between(20, 150), 20 + 30 * turn, 1 + 2 * turn,
                              1 + 2 * turn, 3, turn % 2 == 0, turn < 2, true, turn == 1,
                              turn < 3 ? Number::kFloat32 : Number::kBFloat16};
            Shape fitting = shape;
            fitting.group_columns = std::min(shape.group_columns, shape.columns);
            Problem problem(fitting, Values::kNormal, random);
            const Expected expected = problem.expected();
            problem.x.set(shape.columns + random.between(0, shape.columns - 1), value);
            for (Way way : kWays) {
                const std::string name = std::string(kernels.name) + " " + way.name() + ", " + problem.name() +
                                         ", with " + std::to_string(value);
                describe(name);
                const Numbers output = product(kernels, problem, way, 2);
                bool right = is_right(problem, expected, output, way.fast, tally, 1);
                // For the largest number, only the other rows are checked: its own row may or may not overflow.
                if (!(std::fabs(value) <= FLT_MAX))
                    for (int64_t row = 0; row < shape.rows; ++row)
                        right = right && !std::isfinite(output.get(shape.rows + row));
                tally.expect(right, name);
            }
        }
    // Numbers so small that their unit in 16 bits is subnormal leave only the bias.
    for (float value : {1e-45f, 1e-40f, 1e-36f, 1e-33f, 1e-28f}) {
        const Shape shape{40, 64, 32, 3, 3, 2, true, true, true, false, Number::kFloat32};
        Problem problem(shape, Values::kNormal, random);
        for (int64_t i = 0; i < problem.x.size(); ++i) problem.x.set(i, random.coin() ? value : -value);
        const Expected expected = problem.expected();
        for (Way way : kWays) {
            const std::string name = std::string(kernels.name) + " " + way.name() + " of " + std::to_string(value);
            describe(name);
            const Numbers output = product(kernels, problem, way, 2);
            bool right = true;
            for (int64_t i = 0; i < output.size(); ++i)
                right = right && std::fabs(output.get(i) - expected.values[i]) <= 1e-6 * expected.sizes[i];
            tally.expect(right, name);
        }
    }
}

void check_concurrent_calls(const Kernels& kernels, Random& random, int repeats, Tally& tally) {
    describe(std::string(kernels.name) + ", concurrent calls");
    std::vector<Problem> problems;
    std::vector<std::vector<Numbers>> alone(kThreads);
    for (int i = 0; i < kThreads; ++i) {
        const Shape shape{290 + 31 * i, 150, 50, 2 + i, 2 + i, 1 + 4 * i, i % 2 == 0, i % 2 == 1, true, i < 2,
                          i < 2 ? Number::kFloat32 : Number::kBFloat16};
        problems.emplace_back(shape, Values::kNormal, random);
        for (Way way : kWays) alone[i].push_back(product(kernels, problems[i], way, 1));
    }
    std::atomic<long> right{0}, wrong{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < kThreads; ++i)
        callers.emplace_back([&, i] {
            for (int repeat = 0; repeat < repeats; ++repeat)
                for (size_t way = 0; way < std::size(kWays); ++way) {
                    const int threads = 1 + (repeat + i) % kThreads;
                    ++(product(kernels, problems[i], kWays[way], threads) == alone[i][way] ? right : wrong);
                }
        });
    for (auto& caller : callers) caller.join();
    tally.passed += right;
    if (wrong) tally.expect(false, described() + ": " + std::to_string(wrong) + " differ from single calls");
}

}  // namespace shiftadd::check
