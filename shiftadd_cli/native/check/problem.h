// Random compressed matrices and activations, and their products by the plainest formula in double precision.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../engine.h"
#include "buffer.h"

namespace shiftadd::check {

// splitmix64 (Vigna), the same everywhere, unlike the distributions of <random>.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next();
    // Uniform in [low, high].
    int64_t between(int64_t low, int64_t high);
    bool coin() { return next() >> 63; }
    double uniform();  // in [0, 1)
    double normal();

private:
    uint64_t state_;
};

struct Shape {
    int64_t rows, columns, group_columns;
    int bits, planes;
    int64_t batch;
    bool scale_codes, offsets, bias, signs;
    Number type;
};

Shape random_shape(Random&, bool large);

// Stored bits and computed planes: at most `most` planes that are stored as they are, or those of a trellis code.
std::pair<int, int> random_planes(Random&, int most);

enum class Values { kNormal, kOutliers, kEqual, kZero };

// Activations or output: numbers of one of the two types.
class Numbers {
public:
    Numbers() = default;
    Numbers(Number type, int64_t count);
    void* data();
    const void* data() const;
    float get(int64_t at) const;
    void set(int64_t at, float value);  // truncated to the type
    int64_t size() const { return type_ == Number::kFloat32 ? floats_.size() : halves_.size(); }
    bool operator==(const Numbers& other) const { return floats_ == other.floats_ && halves_ == other.halves_; }

private:
    Number type_ = Number::kFloat32;
    Buffer<float> floats_;
    Buffer<uint16_t> halves_;
};

// The exact product, [batch][rows].
struct Expected {
    std::vector<double> values;
    // Sums of the absolute values of the terms of single planes, the measure for roundings.
    std::vector<double> sizes;
    // Norm of the products without biases, or their norm if no terms cancelled, whichever is larger.
    double norm = 0;
};

struct Problem {
    Shape shape;
    Values values;
    Layout layout;
    Buffer<uint8_t> codes;  // as stored, with random bits beyond the last column
    Buffer<uint32_t> words;
    Buffer<uint8_t> scale_codes;
    Buffer<float> scales, offsets, row_scale, bias, signs;
    Numbers x;

    Problem(const Shape&, Values kind, Random&);
    Matrix matrix() const;
    Activations activations() const;
    // A stored bit, and the computed planes (1 for +1) of a weight.
    int bit(int64_t row, int plane, int64_t column) const;
    std::vector<int> signs_of(int64_t row, int64_t column) const;
    Expected expected() const;
    std::string name() const;
};

// The rotation of one row by its definition: 2^-k Σ_j (-1)^popcount(i & j) s_j x_j over every `order` columns.
std::vector<double> rotated(const std::vector<double>& row, const Buffer<float>& signs, int64_t order);

int64_t rotation_order(int64_t columns);

}  // namespace shiftadd::check
