#include "problem.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>
#include <utility>

#include "../pack.h"
#include "../pool.h"
#include "../trellis_masks.h"

namespace shiftadd::check {

uint64_t Random::next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int64_t Random::between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
}

double Random::uniform() { return std::ldexp(static_cast<double>(next() >> 11), -53); }

double Random::normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * 3.14159265358979323846 * uniform());
}

Shape random_shape(Random& random, bool large) {
    const auto size = [&](int64_t middle, int64_t largest) {
        const int64_t kind = random.between(0, 3);
        return kind == 0 ? random.between(1, 40) : kind < 3 || !large ? random.between(41, middle)
                                                                      : random.between(middle, largest);
    };
    Shape shape{};
    shape.rows = size(200, 600);
    shape.columns = random.coin() ? size(300, 700) : 16 * random.between(1, large ? 40 : 20);
    static constexpr int64_t kGroups[] = {16, 17, 20, 32, 64, 100, 128, 144, 256, 1 << 20};
    shape.group_columns = std::min(kGroups[random.between(0, std::size(kGroups) - 1)], shape.columns);
    std::tie(shape.bits, shape.planes) = random_planes(random, 8);
    shape.batch = random.coin() ? random.between(1, 6) : random.between(7, 40);
    shape.scale_codes = random.coin();
    shape.offsets = random.coin();
    shape.bias = random.coin();
    shape.signs = random.coin();
    shape.type = random.coin() ? Number::kFloat32 : Number::kBFloat16;
    return shape;
}

std::pair<int, int> random_planes(Random& random, int most) {
    const int bits = static_cast<int>(random.between(1, most));
    if (!random.coin()) return {bits, bits};
    std::vector<std::pair<int, int>> codes;
    std::apply([&](auto... code) { (codes.emplace_back(code.kBits, code.kPlanes), ...); }, TrellisCodes{});
    return codes[random.between(0, static_cast<int64_t>(codes.size()) - 1)];
}

// The masks of the code of a layout; empty for planes that are stored as they are.
std::vector<unsigned> trellis_masks(const Layout& layout) {
    std::vector<unsigned> masks;
    const auto take = [&](auto code) {
        if (code.kBits == layout.bits && code.kPlanes == layout.planes)
            masks.assign(std::begin(code.kMasks), std::end(code.kMasks));
    };
    std::apply([&](auto... code) { (take(code), ...); }, TrellisCodes{});
    return masks;
}

Numbers::Numbers(Number type, int64_t count) : type_(type) {
    if (type == Number::kFloat32) floats_ = Buffer<float>(count);
    else halves_ = Buffer<uint16_t>(count);
}

void* Numbers::data() {
    return type_ == Number::kFloat32 ? static_cast<void*>(floats_.data()) : static_cast<void*>(halves_.data());
}

const void* Numbers::data() const { return const_cast<Numbers*>(this)->data(); }

float Numbers::get(int64_t at) const {
    return type_ == Number::kFloat32 ? floats_[at] : std::bit_cast<float>(static_cast<uint32_t>(halves_[at]) << 16);
}

void Numbers::set(int64_t at, float value) {
    // Truncating instead of rounding is good enough for inputs; NaN must not become infinite.
    if (type_ == Number::kFloat32) floats_[at] = value;
    else halves_[at] = std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}

int64_t rotation_order(int64_t columns) { return columns & -columns; }

std::vector<double> rotated(const std::vector<double>& row, const Buffer<float>& signs, int64_t order) {
    int64_t root = 1;
    while (4 * root * root <= order) root *= 2;
    std::vector<double> result(row.size());
    for (size_t i = 0; i < row.size(); ++i) {
        const int64_t start = static_cast<int64_t>(i) / order * order, index = static_cast<int64_t>(i) - start;
        for (int64_t j = 0; j < order; ++j) {
            const double term = row[start + j] * signs[start + j];
            result[i] += std::popcount(static_cast<uint64_t>(index & j)) % 2 ? -term : term;
        }
        result[i] /= static_cast<double>(root);
    }
    return result;
}

Problem::Problem(const Shape& given, Values kind, Random& random)
    : shape(given), values(kind), layout{given.rows, given.columns, given.group_columns, given.bits, given.planes} {
    const int64_t row_bytes = (shape.columns + 7) / 8, groups = layout.blocks() * layout.groups() * kBlockRows;
    codes = Buffer<uint8_t>(shape.rows * shape.bits * row_bytes);
    for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(random.next());
    words = Buffer<uint32_t>(layout.entries());
    Pool::shared().run(layout.stripes(), 3, [&](int64_t stripe) {
        pack_stripe(layout, codes.data(), words.data(), stripe);
    });

    // Scales of rows beyond the last have no effect.
    if (shape.scale_codes) {
        scale_codes = Buffer<uint8_t>(groups * shape.planes);
        for (int64_t i = 0; i < scale_codes.size(); ++i) scale_codes[i] = static_cast<uint8_t>(random.next());
    } else {
        scales = Buffer<float>(groups * shape.planes);
        for (int64_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<float>(random.normal());
    }
    if (shape.offsets) {
        offsets = Buffer<float>(groups);
        for (int64_t i = 0; i < groups; ++i) offsets[i] = static_cast<float>(random.normal());
    }
    row_scale = Buffer<float>(shape.rows);
    for (int64_t i = 0; i < shape.rows; ++i) row_scale[i] = static_cast<float>(std::exp(random.normal()));
    if (shape.bias) {
        bias = Buffer<float>(shape.rows);
        for (int64_t i = 0; i < shape.rows; ++i) bias[i] = static_cast<float>(random.normal());
    }
    if (shape.signs) {
        signs = Buffer<float>(shape.columns);
        for (int64_t i = 0; i < shape.columns; ++i) signs[i] = random.coin() ? 1.0f : -1.0f;
    }

    x = Numbers(shape.type, shape.batch * shape.columns);
    for (int64_t i = 0; i < x.size(); ++i) {
        double value = kind == Values::kEqual ? 1 : kind == Values::kZero ? 0 : random.normal();
        if (kind == Values::kOutliers && i % 97 == 0) value *= 1000;
        x.set(i, static_cast<float>(value));
    }
}

Matrix Problem::matrix() const {
    return {layout,           words.data(),     scale_codes.data(), scales.data(),
            offsets.data(),   row_scale.data(), bias.data()};
}

Activations Problem::activations() const {
    return {x.data(), shape.type, shape.batch, {signs.data(), rotation_order(shape.columns)}};
}

int Problem::bit(int64_t row, int plane, int64_t column) const {
    const int64_t row_bytes = (shape.columns + 7) / 8;
    return codes[(row * shape.bits + plane) * row_bytes + column / 8] >> (column % 8) & 1;
}

std::vector<int> Problem::signs_of(int64_t row, int64_t column) const {
    std::vector<int> planes(shape.planes);
    const std::vector<unsigned> masks = trellis_masks(layout);
    for (int plane = 0; plane < shape.planes; ++plane) {
        if (masks.empty()) planes[plane] = bit(row, plane, column);
        for (unsigned tap = 0; !masks.empty() && masks[plane] >> tap; ++tap) {
            const int64_t above = tap / shape.bits;
            if (masks[plane] >> tap & 1 && row % (kTrellisStripeBlocks * kBlockRows) >= above)
                planes[plane] ^= bit(row - above, static_cast<int>(tap) % shape.bits, column);
        }
    }
    return planes;
}

// The number of a row in scales and offsets of its block: even rows come first.
int64_t number_in_block(int64_t row) { return row % 2 * kPairs + row % kBlockRows / 2; }

Expected Problem::expected() const {
    const int64_t rows = shape.rows, columns = shape.columns, groups = layout.groups();
    const auto scale_of = [&](int64_t row, int64_t group, int plane) -> double {
        const int64_t block_group = row / kBlockRows * groups + group;
        const int64_t at = (block_group * shape.planes + plane) * kBlockRows + number_in_block(row);
        if (!shape.scale_codes) return scales[at];
        const int e = scale_codes[at] & 15, d = scale_codes[at] >> 4 & 7, minus = scale_codes[at] >> 7;
        if (e == 15) return 0;
        return std::ldexp(1.0, -e) + (d == 0 ? 0 : std::ldexp(minus ? -1.0 : 1.0, -e - d));
    };

    // The activations that are multiplied, and their possible rounding errors, in units of a rounding.
    std::vector<double> inputs(shape.batch * columns), moved(shape.batch * columns);
    for (int64_t b = 0; b < shape.batch; ++b) {
        std::vector<double> row(columns);
        for (int64_t c = 0; c < columns; ++c) row[c] = x.get(b * columns + c);
        if (shape.signs) {
            const int64_t order = rotation_order(columns);
            const std::vector<double> rotated_row = rotated(row, signs, order);
            for (int64_t start = 0; start < columns; start += order) {
                double squares = 0;
                for (int64_t c = start; c < start + order; ++c) squares += rotated_row[c] * rotated_row[c];
                for (int64_t c = start; c < start + order; ++c)
                    moved[b * columns + c] = std::sqrt(squares / static_cast<double>(order));
            }
            row = rotated_row;
        }
        std::copy(row.begin(), row.end(), inputs.begin() + b * columns);
    }

    Expected result;
    result.values.resize(shape.batch * rows);
    result.sizes.resize(shape.batch * rows);
    double squares = 0, independent = 0;
    std::vector<double> weights(columns), sizes(columns), powers(columns);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t group = c / shape.group_columns;
            const double offset =
                shape.offsets ? offsets[(r / kBlockRows * groups + group) * kBlockRows + number_in_block(r)] : 0;
            weights[c] = offset;
            sizes[c] = std::fabs(offset);
            powers[c] = offset * offset;
            const std::vector<int> planes = signs_of(r, c);
            for (int plane = 0; plane < shape.planes; ++plane) {
                const double scale = scale_of(r, group, plane);
                weights[c] += planes[plane] ? scale : -scale;
                sizes[c] += std::fabs(scale);
                powers[c] += scale * scale;
            }
        }
        for (int64_t b = 0; b < shape.batch; ++b) {
            const double *input = inputs.data() + b * columns, *change = moved.data() + b * columns;
            double sum = 0, size = 0, power = 0;
            for (int64_t c = 0; c < columns; ++c) {
                sum += input[c] * weights[c];
                size += (std::fabs(input[c]) + change[c]) * sizes[c];
                power += input[c] * input[c] * powers[c];
            }
            const double scale = row_scale[r], added = shape.bias ? bias[r] : 0;
            result.values[b * rows + r] = sum * scale + added;
            result.sizes[b * rows + r] = size * scale + std::fabs(added);
            squares += sum * scale * sum * scale;
            independent += power * scale * scale;
        }
    }
    result.norm = std::sqrt(std::max(squares, independent));
    return result;
}

std::string Problem::name() const {
    std::string text = std::to_string(shape.rows) + "x" + std::to_string(shape.columns) + " groups of " +
                       std::to_string(shape.group_columns) + ", " + std::to_string(shape.bits) + " bits, " +
                       std::to_string(shape.planes) + " planes, batch " + std::to_string(shape.batch);
    text += shape.scale_codes ? ", scale codes" : ", float scales";
    if (shape.offsets) text += ", offsets";
    if (shape.bias) text += ", bias";
    if (shape.signs) text += ", rotated";
    return text + (shape.type == Number::kFloat32 ? ", float32" : ", bfloat16");
}

}  // namespace shiftadd::check
