// Checks the kernels without Python, so that sanitizers and emulators can watch: every instruction set that this
// processor runs against the plainest formula in double precision, in buffers of exactly the right size, from one
// thread and from many.
//
// usage: check [--quick] [--seed N]
//
// One line per instruction set, then `N passed, N failed`; ends with 1 if anything failed.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../codes.h"
#include "../pack.h"
#include "../pool.h"
#include "block_problem.h"
#include "problem.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SHIFTADD_SANITIZED 1
#include <sanitizer/common_interface_defs.h>
#else
#define SHIFTADD_SANITIZED 0
#endif

namespace shiftadd::check {
namespace {

// Half the distance between 1 and the next number. Sums of some hundred terms lose a few of them.
constexpr double kFloatRounding = 0x1p-24, kBFloat16Rounding = 0x1p-8;
constexpr double kExactRoundings = 32, kFastError = 2e-3;
// Equal numbers are rounded the same way every time: their roundings add up, and do not average.
constexpr double kEqualFastError = 3e-3;
// Of whole blocks, relative to the norm of their output; few and narrow layers average less of the 16 bits away.
constexpr double kExactBlockError = 1e-5, kFastBlockError = 1e-2;
constexpr int kThreads = 4;

// What is being checked, for whoever ends the program.
char current[400] = "start";

void describe(const std::string& what) { std::snprintf(current, sizeof(current), "%s", what.c_str()); }

void tell_current() {
    static constexpr char kIntro[] = "It happened in: ";
    (void)!write(2, kIntro, sizeof(kIntro) - 1);
    (void)!write(2, current, std::strlen(current));
    (void)!write(2, "\n", 1);
}

void watch_for_crashes() {
#if SHIFTADD_SANITIZED
    __sanitizer_set_death_callback(tell_current);
#else
    const auto crashed = [](int signal) {
        tell_current();
        std::signal(signal, SIG_DFL);
        std::raise(signal);
    };
    for (int signal : {SIGSEGV, SIGBUS, SIGABRT, SIGILL, SIGFPE}) std::signal(signal, crashed);
#endif
}

class Tally {
public:
    bool expect(bool right, const std::string& what) {
        ++(right ? passed : failed);
        if (!right && failed <= kShown) std::printf("FAILED %s\n", what.c_str());
        if (!right && failed == kShown) std::printf("FAILED ... and whatever comes after these\n");
        return right;
    }
    void add(const Tally& other) {
        passed += other.passed;
        failed += other.failed;
    }
    long passed = 0, failed = 0;
    double roundings = 0, fast_error = 0;  // the largest

private:
    static constexpr long kShown = 20;
};

struct Way {
    Method method;
    bool fast;

    std::string name() const {
        static constexpr const char* kNames[] = {"automatic", "look-up", "multiply"};
        return std::string(kNames[static_cast<int>(method)]) + (fast ? " fast" : " exact");
    }
};

constexpr Way kWays[] = {{Method::kLookUp, false}, {Method::kLookUp, true},    {Method::kMultiply, false},
                         {Method::kMultiply, true}, {Method::kAutomatic, false}, {Method::kAutomatic, true}};

Numbers product(const Kernels& kernels, const Problem& problem, Way way, int threads) {
    Numbers output(problem.shape.type, problem.shape.batch * problem.shape.rows);
    linear(kernels, problem.matrix(), problem.activations(), output.data(), way.fast, way.method, threads);
    return output;
}

// Whether a product is right, row `skip` of the batch apart.
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
        // Not-a-numbers must fail, so comparisons ask for what is right.
        if (fast) continue;
        const double last = rounded ? kBFloat16Rounding * std::fabs(expected.values[i]) : 0;
        const double unit = kFloatRounding * expected.sizes[i] * (1 + (rounded ? kBFloat16Rounding : 0));
        const double roundings = std::max(0.0, error - last) / (unit + DBL_MIN);
        if (!(roundings <= most_roundings)) right = false;
        if (!equal) tally.roundings = std::max(tally.roundings, roundings);
    }
    if (!fast) return right;
    double values = 0;
    for (double each : expected.values) values += each * each;
    // Outputs in bfloat16 are rounded, and inputs once more if they were rotated first.
    const double roundings = rounded ? kBFloat16Rounding * (problem.shape.signs ? 1.5 : 1) : 0;
    const double allowed = (equal ? kEqualFastError : kFastError) * expected.norm +
                           roundings * std::max(std::sqrt(values), expected.norm);
    if (!rounded && !equal && expected.norm > 0)
        tally.fast_error = std::max(tally.fast_error, std::sqrt(errors) / expected.norm);
    return std::sqrt(errors) <= allowed + 1e-30;
}

void check_products(const Kernels& kernels, const Problem& problem, const Expected& expected, Tally& tally) {
    static int turn = 0;
    for (Way way : kWays) {
        const std::string what = std::string(kernels.name) + " " + way.name() + ", " + problem.name();
        describe(what);
        const Numbers alone = product(kernels, problem, way, 1);
        tally.expect(is_right(problem, expected, alone, way.fast, tally), what);
        const int threads = 2 + turn++ % (kThreads - 1);
        const Numbers together = product(kernels, problem, way, threads);
        tally.expect(together == alone, what + ": other bits on " + std::to_string(threads) + " threads");
    }
}

// An activation that is no number spoils its own row of the output, and no other.
void check_not_finite(const Kernels& kernels, Random& random, Tally& tally) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (float value : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(), FLT_MAX, -FLT_MAX})
        for (int turn = 0; turn < 4; ++turn) {
            const Shape shape{random.between(1, 150), random.between(20, 150), 20 + 30 * turn, 1 + 2 * turn,
                              3, turn % 2 == 0, turn < 2, true, turn == 1,
                              turn < 3 ? Number::kFloat32 : Number::kBFloat16};
            Shape fitting = shape;
            fitting.group_columns = std::min(shape.group_columns, shape.columns);
            Problem problem(fitting, Values::kNormal, random);
            const Expected expected = problem.expected();
            problem.x.set(shape.columns + random.between(0, shape.columns - 1), value);
            for (Way way : kWays) {
                const std::string what = std::string(kernels.name) + " " + way.name() + ", " + problem.name() +
                                         ", with " + std::to_string(value);
                describe(what);
                const Numbers output = product(kernels, problem, way, 2);
                bool right = is_right(problem, expected, output, way.fast, tally, 1);
                // Of the largest number only the neighbours are checked: its own row may overflow or not.
                if (!(std::fabs(value) <= FLT_MAX))
                    for (int64_t row = 0; row < shape.rows; ++row)
                        right = right && !std::isfinite(output.get(shape.rows + row));
                tally.expect(right, what);
            }
        }
    // Numbers so small that their unit in 16 bits is no normal one leave the bias.
    for (float value : {1e-45f, 1e-40f, 1e-36f, 1e-33f, 1e-28f}) {
        const Shape shape{40, 64, 32, 3, 2, true, true, true, false, Number::kFloat32};
        Problem problem(shape, Values::kNormal, random);
        for (int64_t i = 0; i < problem.x.size(); ++i) problem.x.set(i, random.coin() ? value : -value);
        const Expected expected = problem.expected();
        for (Way way : kWays) {
            const std::string what = std::string(kernels.name) + " " + way.name() + " of " + std::to_string(value);
            describe(what);
            const Numbers output = product(kernels, problem, way, 2);
            bool right = true;
            for (int64_t i = 0; i < output.size(); ++i)
                right = right && std::fabs(output.get(i) - expected.values[i]) <= 1e-6 * expected.sizes[i];
            tally.expect(right, what);
        }
    }
}

// Look-up tables and their sums are the same bits in every instruction set.
void check_tables(const Kernels& kernels, Random& random, Tally& tally) {
    for (int64_t columns : {16, 48, 128, 272}) {
        describe(std::string(kernels.name) + " tables of " + std::to_string(columns));
        const Layout layout{1, columns, std::min<int64_t>(columns, 144), 1};
        const int64_t padded = layout.padded_columns(), entries = padded / kLookupColumns * kTable;
        Buffer<float> row(padded), tables(entries), plain(entries);
        Buffer<float> units(layout.chunks()), plain_units(layout.chunks());
        Buffer<int16_t> fast(entries), plain_fast(entries);
        for (int64_t i = 0; i < padded; ++i) row[i] = static_cast<float>(random.normal());
        kernels.build_exact(row.data(), padded, tables.data());
        portable_kernels()->build_exact(row.data(), padded, plain.data());
        kernels.build_fast(layout, row.data(), fast.data(), units.data());
        portable_kernels()->build_fast(layout, row.data(), plain_fast.data(), plain_units.data());
        const bool same = tables == plain && fast == plain_fast && units == plain_units;
        tally.expect(same, std::string(current) + " differ from portable ones");
    }
}

// A whole block of a decoder, exact and fast, on one thread and on more.
void check_block(const Kernels& kernels, const BlockProblem& problem, const std::vector<double>& expected,
                 Tally& tally) {
    double norm = 0;
    for (double each : expected) norm += each * each;
    for (bool fast : {false, true}) {
        const std::string what = std::string(kernels.name) + (fast ? " fast, " : " exact, ") + problem.name();
        describe(what);
        const Numbers alone = problem.output(kernels, fast, 1);
        double errors = 0;
        for (int64_t i = 0; i < alone.size(); ++i)
            errors += (alone.get(i) - expected[i]) * (alone.get(i) - expected[i]);
        const double rounding = problem.type == Number::kBFloat16 ? kBFloat16Rounding : 0;
        tally.expect(std::sqrt(errors / norm) <= rounding + (fast ? kFastBlockError : kExactBlockError), what);
        const Numbers together = problem.output(kernels, fast, kThreads);
        tally.expect(together == alone, what + ": other bits on more threads");
    }
}

// One head's attention over tokens that lie apart, and the MLP's gate, each against its formula.
void check_attention(const Kernels& kernels, Random& random, Tally& tally) {
    for (int turn = 0; turn < 60; ++turn) {
        const int64_t size = random.between(1, 80), tokens = random.between(1, 200), stride = size + random.between(0, 9);
        const Number type = turn % 2 ? Number::kFloat32 : Number::kBFloat16;
        describe(std::string(kernels.name) + " attention, " + std::to_string(tokens) + " tokens of " +
                 std::to_string(size));
        Buffer<float> query(size), scores(tokens), output(size);
        // The last token has no gap behind it.
        Numbers keys(type, (tokens - 1) * stride + size), values(type, keys.size());
        // Also scores so far apart that most shares vanish.
        const double spread = turn % 3 == 0 ? 30 : 1;
        for (int64_t i = 0; i < size; ++i) query[i] = static_cast<float>(spread * random.normal());
        for (int64_t i = 0; i < keys.size(); ++i) {
            keys.set(i, static_cast<float>(random.normal()));
            values.set(i, static_cast<float>(random.normal()));
        }
        kernels.attend({query.data(), keys.data(), values.data(), tokens, stride, stride, size, type, 0.25f,
                        scores.data(), output.data()});
        std::vector<double> wanted(size), shares(tokens);
        double largest = -1e300, total = 0;
        for (int64_t token = 0; token < tokens; ++token) {
            for (int64_t i = 0; i < size; ++i) shares[token] += 0.25 * query[i] * keys.get(token * stride + i);
            largest = std::max(largest, shares[token]);
        }
        for (double& share : shares) total += share = std::exp(share - largest);
        bool right = true;
        for (int64_t i = 0; i < size; ++i) {
            for (int64_t token = 0; token < tokens; ++token)
                wanted[i] += shares[token] / total * values.get(token * stride + i);
            // Scores of some hundreds are only known to their last place.
            right = right && std::fabs(output[i] - wanted[i]) <= 2e-6 * spread * 4;
        }
        tally.expect(right, current);
        query[0] = std::numeric_limits<float>::quiet_NaN();
        kernels.attend({query.data(), keys.data(), values.data(), tokens, stride, stride, size, type, 0.25f,
                        scores.data(), output.data()});
        bool spoilt = true;
        for (int64_t i = 0; i < size; ++i) spoilt = spoilt && !std::isfinite(output[i]);
        tally.expect(spoilt, std::string(current) + ", of a query that is no number");
    }
    describe(std::string(kernels.name) + " gate");
    Buffer<float> gate(301), up(301), output(301);
    for (int64_t i = 0; i < gate.size(); ++i) {
        gate[i] = static_cast<float>(i < 200 ? i - 100 : 3 * random.normal());
        up[i] = static_cast<float>(random.normal());
    }
    for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
        kernels.gate(activation, gate.data(), up.data(), gate.size(), output.data());
        bool right = true;
        for (int64_t i = 0; i < gate.size(); ++i) {
            const double wanted = activated(activation, gate[i]) * up[i];
            // Large exponents are rounded, and of 1 + tanh double precision knows no less.
            right = right && std::fabs(output[i] - wanted) <= 2e-5 * std::fabs(wanted) + 1e-14;
        }
        tally.expect(right, current);
    }
}

// Rows of 8-bit codes against their formula.
void check_codes(const Kernels& kernels, Random& random, Tally& tally) {
    for (int turn = 0; turn < 60; ++turn) {
        const int64_t rows = random.between(1, 200), columns = random.between(1, 150), batch = random.between(1, 20);
        const Number type = turn % 2 ? Number::kFloat32 : Number::kBFloat16;
        describe(std::string(kernels.name) + " codes, " + std::to_string(batch) + " x " + std::to_string(columns) +
                 " x " + std::to_string(rows));
        Buffer<int8_t> codes(rows * columns);
        Numbers scale(turn % 4 < 2 ? Number::kFloat32 : Number::kBFloat16, rows), x(type, batch * columns);
        for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(random.between(-128, 127));
        for (int64_t i = 0; i < rows; ++i) scale.set(i, static_cast<float>(random.uniform()));
        for (int64_t i = 0; i < x.size(); ++i) x.set(i, static_cast<float>(random.normal()));
        const CodeRows matrix{codes.data(), scale.data(), turn % 4 < 2 ? Number::kFloat32 : Number::kBFloat16, rows,
                              columns};
        Numbers alone(type, batch * rows), together(type, batch * rows);
        multiply_codes(kernels, matrix, {x.data(), type, batch, {nullptr, 1}}, alone.data(), 1);
        multiply_codes(kernels, matrix, {x.data(), type, batch, {nullptr, 1}}, together.data(), kThreads);
        bool right = together == alone;
        for (int64_t i = 0; i < batch * rows; ++i) {
            double wanted = 0, size = 0;
            for (int64_t column = 0; column < columns; ++column) {
                const double term = codes[i % rows * columns + column] * static_cast<double>(scale.get(i % rows)) *
                                    x.get(i / rows * columns + column);
                wanted += term;
                size += std::fabs(term);
            }
            const double last = type == Number::kBFloat16 ? kBFloat16Rounding * std::fabs(wanted) : 0;
            right = right && std::fabs(alone.get(i) - wanted) <= kExactRoundings * kFloatRounding * size + last;
        }
        tally.expect(right, current);
    }
}

// Several threads of the program at once, each with a problem of its own.
void check_concurrent_calls(const Kernels& kernels, Random& random, int repeats, Tally& tally) {
    describe(std::string(kernels.name) + ", concurrent calls");
    std::vector<Problem> problems;
    std::vector<std::vector<Numbers>> alone(kThreads);
    for (int i = 0; i < kThreads; ++i) {
        const Shape shape{290 + 31 * i, 150, 50, 2 + i, 1 + 4 * i, i % 2 == 0, i % 2 == 1, true, i < 2,
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
    if (wrong) tally.expect(false, std::string(current) + ": " + std::to_string(wrong) + " differ from calls alone");
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
    tally.expect(same, std::string(current) + ": unpacked planes differ");
    tally.expect(ones == stored, std::string(current) + ": padding is not zero");
}

void check_rotation(const Kernels& kernels, Random& random, bool quick, Tally& tally) {
    std::vector<int64_t> widths = {64, 96, 128, 256, 512, 768, 1024, 2048, 3072, 4096};
    for (int64_t columns = 1; columns <= 600; columns += columns < 40 ? 1 : quick ? 89 : 17) widths.push_back(columns);
    for (int64_t columns : widths)
        for (Number type : {Number::kFloat32, Number::kBFloat16}) {
            describe(std::string(kernels.name) + " rotation of " + std::to_string(columns));
            const int64_t rows = random.between(1, 40), order = rotation_order(columns);
            Numbers x(type, rows * columns), output(type, rows * columns);
            Buffer<float> signs(columns);
            for (int64_t i = 0; i < columns; ++i) signs[i] = random.coin() ? 1.0f : -1.0f;
            for (int64_t i = 0; i < x.size(); ++i) x.set(i, static_cast<float>(random.normal()));
            const Activations input{x.data(), type, rows, {signs.data(), order}};
            rotate_rows(kernels, input, columns, output.data(), static_cast<int>(random.between(1, kThreads)));
            bool right = true;
            for (int64_t b = 0; b < rows; ++b) {
                std::vector<double> row(columns);
                for (int64_t c = 0; c < columns; ++c) row[c] = x.get(b * columns + c);
                const std::vector<double> turned = rotated(row, signs, order);
                double largest = 0;
                for (double each : turned) largest = std::max(largest, std::fabs(each));
                for (int64_t c = 0; c < columns; ++c) {
                    const double rounding = type == Number::kBFloat16 ? kBFloat16Rounding * std::fabs(turned[c]) : 0;
                    const double error = std::fabs(output.get(b * columns + c) - turned[c]);
                    right = right && error <= kExactRoundings * kFloatRounding * (largest + 1) + rounding;
                }
            }
            tally.expect(right, current);
        }
}

// Every task of a round once, whatever rounds came before it and whoever else asks.
void check_pool(int rounds, Tally& tally) {
    describe("pool");
    const auto many_rounds = [rounds](Pool& pool, uint64_t seed) {
        Random random(seed);
        bool right = true;
        for (int round = 0; round < rounds; ++round) {
            const int64_t count = random.between(0, 9);
            std::vector<int> calls(count);
            pool.run(count, static_cast<int>(random.between(0, 5)), [&](int64_t i) { ++calls[i]; });
            right = right && std::all_of(calls.begin(), calls.end(), [](int each) { return each == 1; });
            // Long enough now and then for the workers to fall asleep.
            if (round % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
        }
        return right;
    };
    tally.expect(many_rounds(Pool::shared(), 1), "pool, one caller");
    std::atomic<bool> right{true};
    std::vector<std::thread> callers;
    for (int i = 0; i < kThreads; ++i)
        callers.emplace_back([&, i] {
            if (!many_rounds(Pool::shared(), 2 + i)) right = false;
        });
    for (auto& caller : callers) caller.join();
    tally.expect(right, "pool, several callers");
    for (int i = 0; i < 20; ++i) {
        Pool pool;
        std::atomic<int> calls{0};
        for (int round = 0; round < i; ++round) pool.run(5, 1 + i % 5, [&](int64_t) { ++calls; });
        tally.expect(calls == 5 * i, "pool that is destroyed");
    }
}

// A task that throws, as one that gets no memory does: its caller gets the exception, after all others are done.
void check_exceptions(Tally& tally) {
    describe("pool, a task that throws");
    for (int threads : {1, 2, 4}) {
        std::atomic<int> inside{0};
        bool caught = false;
        try {
            Pool::shared().run(100, threads, [&](int64_t i) {
                ++inside;
                if (i == 7) throw std::runtime_error("seven");
                std::this_thread::yield();
                --inside;
            });
        } catch (const std::runtime_error&) {
            // Only the task that threw has not left.
            caught = inside == 1;
        }
        tally.expect(caught, current);
        std::atomic<int> calls{0};
        Pool::shared().run(100, threads, [&](int64_t) { ++calls; });
        tally.expect(calls == 100, "pool after a task that threw");
    }
}

// A team as torch's: the caller and threads beside it, of which some come late and one not at all.
void threads_of_our_own(void (*work)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 2; i < threads; ++i)
        others.emplace_back([=] {
            if (i % 2) std::this_thread::sleep_for(std::chrono::microseconds(100));
            work(data);
        });
    work(data);
    for (auto& other : others) other.join();
}

// Rounds within one call of a team, from several threads of the program at once.
void check_together(int rounds, Tally& tally) {
    describe("together");
    Pool::use_team(threads_of_our_own);
    std::atomic<long> right{0}, wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kThreads; ++caller)
        callers.emplace_back([&, caller] {
            Random random(caller);
            for (int round = 0; round < rounds; ++round)
                Pool::shared().together(1 + (round + caller) % 5, [&] {
                    for (int64_t inner = random.between(0, 20); inner > 0; --inner) {
                        std::vector<int> calls(random.between(0, 9));
                        Pool::shared().run(static_cast<int64_t>(calls.size()), static_cast<int>(random.between(1, 4)),
                                           [&](int64_t i) { ++calls[i]; });
                        const bool once = std::all_of(calls.begin(), calls.end(), [](int each) { return each == 1; });
                        ++(once ? right : wrong);
                    }
                });
        });
    for (auto& caller : callers) caller.join();
    tally.passed += right;
    if (wrong) tally.expect(false, std::string(current) + ": " + std::to_string(wrong) + " rounds were wrong");
#if !defined(__SANITIZE_THREAD__)
    bool caught = false, after = false;
    Pool::shared().together(4, [&] {
        try {
            Pool::shared().run(50, 4, [](int64_t i) {
                if (i == 7) throw std::runtime_error("seven");
            });
        } catch (const std::runtime_error&) {
            caught = true;
        }
        std::atomic<int> calls{0};
        Pool::shared().run(50, 4, [&](int64_t) { ++calls; });
        after = calls == 50;
    });
    tally.expect(caught && after, "together, a task that throws");
    caught = false;
    try {
        Pool::shared().together(4, [] { throw std::bad_alloc(); });
    } catch (const std::bad_alloc&) {
        caught = true;
    }
    tally.expect(caught, "together, a body that throws");
#endif
    Random random(5);
    for (int number = 0; number < 10; ++number) {
        const BlockProblem problem(random);
        const Numbers alone = problem.output(**available_kernels(), true, 1);
        tally.expect(problem.output(**available_kernels(), true, kThreads) == alone, "together, " + problem.name());
    }
    Pool::use_team(nullptr);
}

// What `inside` returns in a child process, which gets half a minute.
template <class Inside>
bool in_child(Inside inside) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        alarm(30);
        _exit(inside() ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Children have none of their parent's workers, and start their own.
void check_fork(Random& random, Tally& tally) {
    describe("fork");
    const Shape shape{300, 400, 128, 4, 3, true, true, true, true, Number::kFloat32};
    const Problem problem(shape, Values::kNormal, random);
    const Kernels& kernels = **available_kernels();
    const Numbers alone = product(kernels, problem, kWays[0], 1);
    const auto same = [&] { return product(kernels, problem, kWays[0], kThreads) == alone; };
    tally.expect(same() && in_child(same) && same(), "a child of an idle parent");
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop) (void)product(kernels, problem, kWays[0], kThreads);
    });
    bool right = true;
    for (int i = 0; i < 10; ++i) right = right && in_child(same);
    stop = true;
    busy.join();
    tally.expect(right, "children of a parent whose pool is at work");
}

// Leaves this process room for small things only.
bool limit_memory() {
    long pages = 0;
    std::FILE* sizes = std::fopen("/proc/self/statm", "r");
    if (!sizes || std::fscanf(sizes, "%ld", &pages) != 1) return false;
    std::fclose(sizes);
    const rlim_t most = static_cast<rlim_t>(pages) * sysconf(_SC_PAGESIZE) + (2 << 20);
    const rlimit limit{most, most};
    return setrlimit(RLIMIT_AS, &limit) == 0;
}

// A process that may start no more threads computes with those that it has.
void check_without_threads(Tally& tally) {
    describe("no more threads");
    tally.expect(in_child([] {
        if (!limit_memory()) return false;
        std::atomic<int> calls{0};
        for (int round = 1; round <= 3; ++round) {
            try {
                // The parent leaves some stacks over, but not hundreds.
                Pool::shared().run(500, 500, [&](int64_t) { ++calls; });
            } catch (const std::exception&) {
                return false;
            }
            if (calls != 500 * round) return false;
        }
        return true;
    }), current);
}

// A product that finds no memory says so, and the next one that does is right.
void check_without_memory(Random& random, Tally& tally) {
    describe("no more memory");
    const Shape shape{1, 400, 128, 1, 5, true, false, false, false, Number::kFloat32};
    Shape large_shape = shape;
    large_shape.batch = 40000;
    const Problem small(shape, Values::kNormal, random), large(large_shape, Values::kNormal, random);
    const Kernels& kernels = **available_kernels();
    const Way way{Method::kMultiply, false};
    const Numbers alone = product(kernels, small, way, 1);
    Numbers output(shape.type, large_shape.batch);
    tally.expect(in_child([&] {
        if (!limit_memory()) return false;
        try {
            linear(kernels, large.matrix(), large.activations(), output.data(), way.fast, way.method, 1);
            return false;
        } catch (const std::bad_alloc&) {
            return product(kernels, small, way, 1) == alone;
        }
    }), current);
}

void check_all(uint64_t seed, bool quick) {
    Tally rest;
    std::vector<Tally> tallies;
    for (const Kernels* const* each = available_kernels(); *each; ++each) tallies.emplace_back();

    const int problems = quick ? 40 : 300;
    for (int number = 0; number < problems; ++number) {
        Random random(seed + number);
        const Problem problem(random_shape(random, !quick), static_cast<Values>(number % 4), random);
        check_packing(problem, rest);
        const Expected expected = problem.expected();
        for (size_t i = 0; i < tallies.size(); ++i)
            check_products(*available_kernels()[i], problem, expected, tallies[i]);
    }
    for (int number = 0; number < problems / 4; ++number) {
        Random random(seed + number);
        BlockProblem problem(random);
        const std::vector<double> expected = problem.expected();
        for (size_t i = 0; i < tallies.size(); ++i)
            check_block(*available_kernels()[i], problem, expected, tallies[i]);
    }
    for (size_t i = 0; i < tallies.size(); ++i) {
        const Kernels& kernels = *available_kernels()[i];
        Random random(seed);
        check_tables(kernels, random, tallies[i]);
        check_attention(kernels, random, tallies[i]);
        check_codes(kernels, random, tallies[i]);
        check_rotation(kernels, random, quick, tallies[i]);
        check_not_finite(kernels, random, tallies[i]);
        check_concurrent_calls(kernels, random, quick ? 3 : 20, tallies[i]);
        std::printf("%-12s %ld passed, %ld failed; exact within %.2f roundings, fast within %.1e\n", kernels.name,
                    tallies[i].passed, tallies[i].failed, tallies[i].roundings, tallies[i].fast_error);
    }
    Random random(seed);
    check_pool(quick ? 1000 : 20000, rest);
    check_together(quick ? 100 : 1000, rest);
#if !defined(__SANITIZE_THREAD__)
    // The thread sanitizer watches neither children nor the library that carries exceptions from thread to thread.
    check_exceptions(rest);
    check_fork(random, rest);
#endif
#if !SHIFTADD_SANITIZED && defined(__x86_64__)
    // Sanitizers need more addresses than the limit leaves, and the emulator does not keep to it.
    check_without_threads(rest);
    check_without_memory(random, rest);
#endif
    std::printf("%-12s %ld passed, %ld failed\n", "the rest", rest.passed, rest.failed);
    for (const Tally& each : tallies) rest.add(each);
    std::printf("%ld passed, %ld failed\n", rest.passed, rest.failed);
    std::fflush(nullptr);
    // Ends while the workers still look for work, as a process may.
    Pool::shared().run(8, kThreads, [](int64_t) {});
    std::exit(rest.failed ? 1 : 0);
}

}  // namespace
}  // namespace shiftadd::check

int main(int count, char** arguments) {
    using namespace shiftadd::check;
    uint64_t seed = 1;
    bool quick = false;
    for (int i = 1; i < count; ++i) {
        if (std::strcmp(arguments[i], "--quick") == 0) {
            quick = true;
        } else if (std::strcmp(arguments[i], "--seed") == 0 && i + 1 < count) {
            seed = std::strtoull(arguments[++i], nullptr, 10);
        } else {
            std::fprintf(stderr, "usage: check [--quick] [--seed N]\n");
            return 2;
        }
    }
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    watch_for_crashes();
    check_all(seed, quick);
}
