#include "parts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "../codes.h"

namespace shiftadd::check {
namespace {

// Errors of whole blocks, relative to the norm of their output; few, narrow layers average out less 16-bit rounding.
constexpr double kExactBlockError = 1e-5, kFastBlockError = 1e-2;

// The sum over the columns of a word with these signs, from its 16-bit tables.
int looked_up(const HalfTables& halves, const int16_t* entries, int bits) {
    int sum = 0;
    for (int table = 0; table < halves.count; ++table)
        sum += entries[halves.start(table) + (bits >> halves.first_column(table) & ((1 << halves.columns[table]) - 1))];
    return sum;
}

}  // namespace

void check_tables(const Kernels& kernels, Random& random, Tally& tally) {
    for (int64_t columns : {16, 48, 128, 272}) {
        describe(std::string(kernels.name) + " tables of " + std::to_string(columns));
        const Layout layout{1, columns, std::min<int64_t>(columns, 144), 1, 1};
        const int64_t padded = layout.padded_columns(), entries = padded / kLookupColumns * kTable;
        const int64_t words = padded / kWordColumns;
        const HalfTables &halves = kernels.half_tables, &plain_halves = portable_kernels()->half_tables;
        Buffer<float> row(padded), tables(entries), plain(entries);
        Buffer<float> units(layout.chunks()), plain_units(layout.chunks());
        Buffer<int16_t> fast(words * halves.entries()), plain_fast(words * plain_halves.entries());
        for (int64_t i = 0; i < padded; ++i) row[i] = static_cast<float>(random.normal());
        kernels.build_exact(row.data(), padded, tables.data());
        portable_kernels()->build_exact(row.data(), padded, plain.data());
        kernels.build_fast(layout, row.data(), fast.data(), units.data());
        portable_kernels()->build_fast(layout, row.data(), plain_fast.data(), plain_units.data());
        bool same = tables == plain && units == plain_units;
        for (int64_t word = 0; word < words; ++word)
            for (int bits = 0; bits < 1 << kWordColumns; ++bits)
                same = same && looked_up(halves, fast.data() + word * halves.entries(), bits) ==
                                   looked_up(plain_halves, plain_fast.data() + word * plain_halves.entries(), bits);
        tally.expect(same, described() + " differ from portable ones");
    }
}

void check_rotation(const Kernels& kernels, Random& random, bool quick, Tally& tally) {
    std::vector<int64_t> widths = {64, 96, 128, 256, 512, 768, 1024, 2048, 3072, 4096};
    for (int64_t columns = 1; columns <= 600; columns += columns < 40 ? 1 : quick ? 89 : 17) widths.push_back(columns);
    for (int64_t columns : widths)
        for (Number type : {Number::kFloat32, Number::kBFloat16}) {
            describe(std::string(kernels.name) + " rotation of " + std::to_string(columns));
            // The reference multiplies by the whole matrix of signs.
            const int64_t rows = random.between(1, quick && columns > 600 ? 3 : 40), order = rotation_order(columns);
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
                const std::vector<double> rotated_row = rotated(row, signs, order);
                double largest = 0;
                for (double value : rotated_row) largest = std::max(largest, std::fabs(value));
                for (int64_t c = 0; c < columns; ++c) {
                    const double rounding =
                        type == Number::kBFloat16 ? kBFloat16Rounding * std::fabs(rotated_row[c]) : 0;
                    const double error = std::fabs(output.get(b * columns + c) - rotated_row[c]);
                    right = right && error <= kExactRoundings * kFloatRounding * (largest + 1) + rounding;
                }
            }
            tally.expect(right, described());
        }
}

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
            double expected = 0, size = 0;
            for (int64_t column = 0; column < columns; ++column) {
                const double term = codes[i % rows * columns + column] * static_cast<double>(scale.get(i % rows)) *
                                    x.get(i / rows * columns + column);
                expected += term;
                size += std::fabs(term);
            }
            const double last = type == Number::kBFloat16 ? kBFloat16Rounding * std::fabs(expected) : 0;
            right = right && std::fabs(alone.get(i) - expected) <= kExactRoundings * kFloatRounding * size + last;
        }
        tally.expect(right, described());
    }
}

void check_attention(const Kernels& kernels, Random& random, Tally& tally) {
    for (int turn = 0; turn < 60; ++turn) {
        const int64_t size = random.between(1, 80), tokens = random.between(1, 200);
        const int64_t stride = size + random.between(0, 9);
        const Number type = turn % 2 ? Number::kFloat32 : Number::kBFloat16;
        describe(std::string(kernels.name) + " attention, " + std::to_string(tokens) + " tokens of " +
                 std::to_string(size));
        Buffer<float> query(size), scores(tokens), output(size);
        // No gap follows the last token.
        Numbers keys(type, (tokens - 1) * stride + size), values(type, keys.size());
        // In some turns, scores are so far apart that most shares vanish.
        const double spread = turn % 3 == 0 ? 30 : 1;
        for (int64_t i = 0; i < size; ++i) query[i] = static_cast<float>(spread * random.normal());
        for (int64_t i = 0; i < keys.size(); ++i) {
            keys.set(i, static_cast<float>(random.normal()));
            values.set(i, static_cast<float>(random.normal()));
        }
        kernels.attend({query.data(), keys.data(), values.data(), tokens, stride, stride, size, type, 0.25f,
                        scores.data(), output.data()});
        std::vector<double> expected(size), shares(tokens);
        double largest = -1e300, total = 0;
        for (int64_t token = 0; token < tokens; ++token) {
            for (int64_t i = 0; i < size; ++i) shares[token] += 0.25 * query[i] * keys.get(token * stride + i);
            largest = std::max(largest, shares[token]);
        }
        for (double& share : shares) total += share = std::exp(share - largest);
        bool right = true;
        for (int64_t i = 0; i < size; ++i) {
            for (int64_t token = 0; token < tokens; ++token)
                expected[i] += shares[token] / total * values.get(token * stride + i);
            // Scores of some hundreds are exact only to their last place.
            right = right && std::fabs(output[i] - expected[i]) <= 2e-6 * spread * 4;
        }
        tally.expect(right, described());
        query[0] = std::numeric_limits<float>::quiet_NaN();
        kernels.attend({query.data(), keys.data(), values.data(), tokens, stride, stride, size, type, 0.25f,
                        scores.data(), output.data()});
        bool spoilt = true;
        for (int64_t i = 0; i < size; ++i) spoilt = spoilt && !std::isfinite(output[i]);
        tally.expect(spoilt, described() + ", with NaN in the query");
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
            const double expected = activated(activation, gate[i]) * up[i];
            // Large exponents are rounded, and double precision resolves 1 + tanh no better.
            right = right && std::fabs(output[i] - expected) <= 2e-5 * std::fabs(expected) + 1e-14;
        }
        tally.expect(right, described());
    }
}

void check_block(const Kernels& kernels, const BlockProblem& problem, const std::vector<double>& expected,
                 Tally& tally) {
    double norm = 0;
    for (double value : expected) norm += value * value;
    for (bool fast : {false, true}) {
        const std::string name = std::string(kernels.name) + (fast ? " fast, " : " exact, ") + problem.name();
        describe(name);
        const Numbers alone = problem.output(kernels, fast, 1);
        double errors = 0;
        for (int64_t i = 0; i < alone.size(); ++i)
            errors += (alone.get(i) - expected[i]) * (alone.get(i) - expected[i]);
        const double rounding = problem.type == Number::kBFloat16 ? kBFloat16Rounding : 0;
        tally.expect(std::sqrt(errors / norm) <= rounding + (fast ? kFastBlockError : kExactBlockError), name);
        const Numbers together = problem.output(kernels, fast, kThreads);
        tally.expect(together == alone, name + ": other bits on more threads");
        const Numbers deep = problem.repeated(kernels, fast, 1, 3);
        for (int threads : {1, kThreads})
            tally.expect(problem.stacked(kernels, fast, threads, 3) == deep, name + ": other bits in a stack");
    }
}

}  // namespace shiftadd::check
