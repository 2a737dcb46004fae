#include "block_problem.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../stack.h"

namespace shiftadd::check {
namespace {

constexpr float kEpsilon = 1e-5f;

Problem matrix(int64_t rows, int64_t columns, int64_t batch, bool bias, bool signs, Random& random) {
    static constexpr int64_t kGroups[] = {16, 20, 32, 64, 128, 1 << 20};
    const int64_t group = std::min(kGroups[random.between(0, 5)], columns);
    const auto [bits, planes] = random_planes(random, 5);
    const Shape shape{rows,          columns,       group, bits,  planes,          batch,
                      random.coin(), random.coin(), bias,  signs, Number::kFloat32};
    return Problem(shape, Values::kNormal, random);
}

Numbers normal(Number type, int64_t count, Random& random) {
    Numbers numbers(type, count);
    for (int64_t i = 0; i < count; ++i) numbers.set(i, static_cast<float>(random.normal()));
    return numbers;
}

void normalise(double* row, const float* weight, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += row[i] * row[i];
    const double factor = 1 / std::sqrt(sum / static_cast<double>(count) + kEpsilon);
    for (int64_t i = 0; i < count; ++i) row[i] *= factor * weight[i];
}

// Each row has as many numbers as the norm has weights.
void normalise_rows(std::vector<double>& rows, const Buffer<float>& norm) {
    for (size_t at = 0; at < rows.size(); at += norm.size()) normalise(rows.data() + at, norm.data(), norm.size());
}

Projection projection(const Problem& problem) {
    return {problem.matrix(), problem.activations().rotation};
}

}  // namespace

double activated(Activation activation, double x) {
    if (activation == Activation::kSilu) return x / (1 + std::exp(-x));
    return x / 2 * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

BlockProblem::BlockProblem(Random& random)
    : columns(random.between(8, 90)),
      heads(0),
      key_heads(random.between(1, 3)),
      size(2 * random.between(1, 20)),
      inner(random.between(5, 150)),
      tokens(random.between(1, 40)),
      rows(static_cast<int>(random.between(1, kTileRows))),
      type(random.coin() ? Number::kFloat32 : Number::kBFloat16),
      position_type(random.coin() ? type : Number::kFloat32),
      consecutive(rows > 1 && random.coin()),
      inner_norms(random.between(0, 3) > 0),
      head_norms(random.coin()),
      joint(random.coin()),
      outer_norms(random.coin() || !inner_norms),
      one_position(random.coin()),
      turned(random.between(0, 3) > 0),
      residual(random.coin() ? 1 : 0.3f),
      activation(random.coin() ? Activation::kSilu : Activation::kGeluTanh) {
    heads = key_heads * random.between(1, 3);
    const bool bias = random.coin(), signs = random.coin();
    for (int64_t width : {heads * size, key_heads * size, key_heads * size})
        parts.push_back(matrix(width, columns, rows, bias, signs, random));
    parts.push_back(matrix(columns, heads * size, rows, false, signs, random));
    for (int i = 0; i < 2; ++i) parts.push_back(matrix(inner, columns, rows, false, signs, random));
    parts.push_back(matrix(columns, inner, rows, false, signs, random));
    // Weights as large as a model's, so that products are as large as their inputs.
    for (Problem& part : parts)
        for (int64_t i = 0; i < part.row_scale.size(); ++i)
            part.row_scale[i] /= std::sqrt(static_cast<float>(part.shape.columns));
    const int64_t query_norm = joint ? heads * size : size, key_norm = joint ? key_heads * size : size;
    for (int64_t count : {columns, columns, query_norm, key_norm, columns, columns}) {
        Buffer<float> norm(count);
        for (int64_t i = 0; i < count; ++i) norm[i] = 1 + 0.1f * static_cast<float>(random.normal());
        norms.push_back(std::move(norm));
    }
    hidden = normal(type, rows * columns, random);
    const int64_t angles = (one_position ? 1 : rows) * size;
    cosines = normal(position_type, angles, random);
    sines = normal(position_type, angles, random);
    keys = normal(type, sequences() * key_heads * tokens * size, random);
    values = normal(type, sequences() * key_heads * tokens * size, random);
}

std::string BlockProblem::name() const {
    return "block of " + std::to_string(columns) + " columns, " + std::to_string(heads) + " heads of " +
           std::to_string(size) + ", " + std::to_string(inner) + " inside, " + std::to_string(rows) +
           (consecutive ? " consecutive" : "") + " rows, " + std::to_string(tokens) + " tokens" +
           (type == Number::kFloat32 ? "" : ", bfloat16");
}

DecoderBlock BlockProblem::block() const {
    DecoderBlock block{projection(parts[0]), projection(parts[1]), projection(parts[2]), projection(parts[3]),
                       projection(parts[4]), projection(parts[5]), projection(parts[6]),
                       {}, kEpsilon, activation, size, 1 / std::sqrt(static_cast<float>(size)), residual, turned};
    block.norms.joint = joint;
    if (inner_norms) {
        block.norms.before_attention = norms[0].data();
        block.norms.before_mlp = norms[1].data();
    }
    if (head_norms) {
        block.norms.query = norms[2].data();
        block.norms.key = norms[3].data();
    }
    if (outer_norms) {
        block.norms.after_attention = norms[4].data();
        block.norms.after_mlp = norms[5].data();
    }
    return block;
}

Positions BlockProblem::positions() const {
    return {cosines.data(), sines.data(), position_type, one_position ? 0 : size};
}

Numbers BlockProblem::output(const Kernels& kernels, bool fast, int threads) const {
    return output_of(kernels, fast, threads, hidden);
}

Numbers BlockProblem::repeated(const Kernels& kernels, bool fast, int threads, int depth) const {
    Numbers state = output(kernels, fast, threads);
    for (int block = 1; block < depth; ++block) state = output_of(kernels, fast, threads, state);
    return state;
}

Numbers BlockProblem::stacked(const Kernels& kernels, bool fast, int threads, int depth) const {
    const DecoderBlock decoder_block = block();
    std::vector<Numbers> all_keys, all_values;
    std::vector<BlockCache> caches;
    for (int block = 0; block < depth; ++block) {
        // Room for more tokens than needed, and different for each block.
        const int64_t capacity = tokens + tokens_of_each() + 2 * block, heads_in_all = sequences() * key_heads;
        all_keys.emplace_back(type, heads_in_all * capacity * size);
        all_values.emplace_back(type, heads_in_all * capacity * size);
        for (int64_t head = 0; head < heads_in_all; ++head)
            for (int64_t i = 0; i < tokens * size; ++i) {
                all_keys.back().set(head * capacity * size + i, keys.get(head * tokens * size + i));
                all_values.back().set(head * capacity * size + i, values.get(head * tokens * size + i));
            }
        caches.push_back({all_keys.back().data(), all_values.back().data(), capacity});
    }
    Numbers result(type, rows * columns);
    decode_stack({kernels, fast, threads}, {std::vector<const DecoderBlock*>(depth, &decoder_block)},
                 {hidden.data(), type, rows, consecutive}, positions(), caches, tokens, result.data());
    return result;
}

Numbers BlockProblem::output_of(const Kernels& kernels, bool fast, int threads, const Numbers& input) const {
    const Run run{kernels, fast, threads};
    const DecoderBlock decoder_block = block();
    const Hidden state{input.data(), type, rows, consecutive};
    Buffer<float> queries(rows * heads * size);
    Numbers new_keys(type, rows * key_heads * size), new_values(type, rows * key_heads * size);
    Numbers result(type, rows * columns);
    const int64_t fresh_stride = tokens_of_each() * size, row_stride = consecutive ? size : key_heads * size;
    decode_heads(run, decoder_block, state, positions(), queries.data(), {new_keys.data(), row_stride, fresh_stride},
                 {new_values.data(), row_stride, fresh_stride});
    // Like a cache: the new tokens follow the earlier ones.
    const int64_t old_stride = tokens * size, stride = old_stride + fresh_stride;
    Numbers all_keys(type, sequences() * key_heads * stride), all_values(type, sequences() * key_heads * stride);
    for (int64_t head = 0; head < sequences() * key_heads; ++head)
        for (int64_t i = 0; i < stride; ++i) {
            const int64_t at = head * stride + i, old = head * old_stride + i;
            const int64_t fresh = head * fresh_stride + i - old_stride;
            all_keys.set(at, i < old_stride ? keys.get(old) : new_keys.get(fresh));
            all_values.set(at, i < old_stride ? values.get(old) : new_values.get(fresh));
        }
    const int64_t sequence_stride = consecutive ? 0 : key_heads * stride;
    decode_rest(run, decoder_block, state, queries.data(), {all_keys.data(), sequence_stride, stride, size},
                {all_values.data(), sequence_stride, stride, size}, tokens + 1, result.data());
    return result;
}

std::vector<double> BlockProblem::product(int part, const std::vector<double>& input) {
    Problem& problem = parts[part];
    for (int64_t i = 0; i < problem.x.size(); ++i) problem.x.set(i, static_cast<float>(input[i]));
    return problem.expected().values;
}

std::vector<double> BlockProblem::expected() {
    std::vector<double> state(rows * columns);
    for (int64_t i = 0; i < rows * columns; ++i) state[i] = hidden.get(i);
    std::vector<double> normed = state;
    if (inner_norms) normalise_rows(normed, norms[0]);
    std::vector<double> query = product(0, normed), key = product(1, normed);
    const std::vector<double> value = product(2, normed);
    const auto normalise_and_turn = [&](std::vector<double>& all, int64_t count, const Buffer<float>& norm) {
        if (head_norms && joint) normalise_rows(all, norm);
        for (int64_t head = 0; head < rows * count; ++head) {
            double* numbers = all.data() + head * size;
            if (head_norms && !joint) normalise(numbers, norm.data(), size);
            if (!turned) continue;
            const std::vector<double> old(numbers, numbers + size);
            const int64_t position = one_position ? 0 : head / count * size;
            for (int64_t i = 0; i < size; ++i) {
                const double other = i < size / 2 ? -old[i + size / 2] : old[i - size / 2];
                numbers[i] = old[i] * cosines.get(position + i) + other * sines.get(position + i);
            }
        }
    };
    normalise_and_turn(query, heads, norms[2]);
    normalise_and_turn(key, key_heads, norms[3]);
    std::vector<double> attended(rows * heads * size);
    for (int64_t task = 0; task < rows * heads; ++task) {
        const int64_t row = task / heads, head = task % heads / (heads / key_heads);
        const int64_t sequence = consecutive ? 0 : row, first_row = consecutive ? 0 : row;
        const auto number = [&](const Numbers& old, const std::vector<double>& fresh, int64_t token,
                                int64_t i) -> double {
            if (token < tokens) return old.get(((sequence * key_heads + head) * tokens + token) * size + i);
            return fresh[((first_row + token - tokens) * key_heads + head) * size + i];
        };
        const int64_t last = tokens + row - first_row;
        std::vector<double> shares(last + 1);
        double total = 0;
        for (int64_t token = 0; token <= last; ++token) {
            double score = 0;
            for (int64_t i = 0; i < size; ++i) score += query[task * size + i] * number(keys, key, token, i);
            total += shares[token] = std::exp(score / std::sqrt(static_cast<double>(size)));
        }
        for (int64_t token = 0; token <= last; ++token)
            for (int64_t i = 0; i < size; ++i)
                attended[task * size + i] += shares[token] / total * number(values, value, token, i);
    }
    std::vector<double> mixed = product(3, attended);
    if (outer_norms) normalise_rows(mixed, norms[4]);
    for (size_t i = 0; i < state.size(); ++i) state[i] += residual * mixed[i];
    normed = state;
    if (inner_norms) normalise_rows(normed, norms[1]);
    std::vector<double> gate = product(4, normed);
    const std::vector<double> up = product(5, normed);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = activated(activation, gate[i]) * up[i];
    std::vector<double> down = product(6, gate);
    if (outer_norms) normalise_rows(down, norms[5]);
    for (size_t i = 0; i < state.size(); ++i) state[i] += residual * down[i];
    return state;
}

}  // namespace shiftadd::check
