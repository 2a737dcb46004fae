#include "block.h"

#include <array>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace shiftadd {
namespace {

// Squares are summed in double: a float32 sum of thousands would be the least exact number of the block.
float inverse_root_mean_square(const float* row, int64_t count, float epsilon) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(row[i]) * row[i];
    return static_cast<float>(1 / std::sqrt(sum / static_cast<double>(count) + epsilon));
}

// Without a weight, copies the row.
void normalise(const float* row, const float* weight, int64_t count, float epsilon, float* out) {
    if (!weight) {
        if (out != row) std::memcpy(out, row, count * sizeof(float));
        return;
    }
    const float factor = inverse_root_mean_square(row, count, epsilon);
    for (int64_t i = 0; i < count; ++i) out[i] = row[i] * factor * weight[i];
}

void normalise_rows(float* values, const float* weight, int64_t rows, int64_t columns, float epsilon) {
    for (float* row = values; row < values + rows * columns; row += columns)
        normalise(row, weight, columns, epsilon, row);
}

// Rotates each pair (i, i + size / 2) of a head by the angle of its position, like transformers' `rotate_half`.
void turn(float* head, const float* cosines, const float* sines, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = head[i], high = head[i + half];
        head[i] = low * cosines[i] - high * sines[i];
        head[i + half] = high * cosines[i + half] + low * sines[i + half];
    }
}

struct Target {
    const Projection* projection;
    float* output;  // [rows][rows of the matrix]
};

bool same_tables(const Projection& a, const Projection& b) {
    return a.matrix.layout.group_columns == b.matrix.layout.group_columns && a.rotation.signs == b.rotation.signs;
}

// Products of the same rows with several matrices, in one round of tasks. Matrices with equal tables share them.
template <size_t N>
void project(const Run& run, const std::array<Target, N>& targets, const FillRow& fill, int rows) {
    thread_local std::array<LookupScratch, N> scratch;
    std::array<Lookups, N> in;
    std::array<int64_t, N + 1> first{};
    int64_t bytes = 0;
    bool sums = false;
    for (const Target& target : targets) {
        bytes += target.projection->matrix.layout.bytes();
        sums = sums || target.projection->matrix.offsets;
    }
    const int threads = useful_threads(run.threads, bytes * rows);
    for (size_t i = 0; i < N; ++i) {
        const Projection& projection = *targets[i].projection;
        size_t match = 0;
        while (match < i && !same_tables(*targets[match].projection, projection)) ++match;
        in[i] = match < i ? in[match]
                          : build_lookups(run.kernels, projection.matrix.layout, projection.rotation, fill, rows,
                                          run.fast, sums, threads, scratch[i]);
        in[i].output = targets[i].output;
        first[i + 1] = first[i] + projection.matrix.layout.stripes();
    }
    const auto look_up = run.fast ? run.kernels.look_up_fast : run.kernels.look_up;
    Pool::shared().run(first[N], threads, [&](int64_t task) {
        size_t i = 0;
        while (task >= first[i + 1]) ++i;
        look_up(targets[i].projection->matrix, in[i], task - first[i]);
    });
}

void attend_and_mix(const Run& run, const DecoderBlock& block, const Hidden& hidden, const float* queries,
                 const Cached& keys, const Cached& values, int64_t tokens, void* output) {
    thread_local Scratch attended_scratch, state_scratch, gate_scratch, up_scratch, down_scratch;
    const int64_t columns = block.columns(), size = block.head_size, heads = block.query_heads();
    const int64_t width = heads * size, inner = block.gate.matrix.layout.rows, shared = heads / block.key_heads();
    const int rows = hidden.rows;
    float* attended = attended_scratch.room<float>(rows * width);
    const int64_t number = hidden.type == Number::kFloat32 ? sizeof(float) : sizeof(uint16_t);
    const auto cached_head = [&](const Cached& cached, int64_t row, int64_t head) -> const void* {
        return static_cast<const char*>(cached.values) +
               number * (row * cached.row_stride + head / shared * cached.head_stride);
    };
    Pool::shared().run(rows * heads, useful_threads(run.threads, rows * width * tokens * number), [&](int64_t task) {
        thread_local Scratch score_scratch;
        const int64_t row = task / heads, head = task % heads;
        const int64_t seen = tokens + (hidden.consecutive ? row : 0);
        run.kernels.attend({queries + task * size, cached_head(keys, row, head), cached_head(values, row, head), seen,
                            keys.token_stride, values.token_stride, size, hidden.type, block.scale,
                            score_scratch.room<float>(seen), attended + task * size});
    });

    // The hidden state after attention, [rows][columns].
    float* state = state_scratch.room<float>(rows * columns);
    project<1>(run, {{{&block.output, state}}},
               [&](int64_t row, float* out) { std::memcpy(out, attended + row * width, width * sizeof(float)); }, rows);
    normalise_rows(state, block.norms.after_attention, rows, columns, block.epsilon);
    float* input = down_scratch.room<float>(rows * columns);
    read_numbers(hidden.values, hidden.type, 0, rows * columns, input);
    for (int64_t i = 0; i < rows * columns; ++i) state[i] = input[i] + block.residual * state[i];

    float* gate = gate_scratch.room<float>(rows * inner);
    float* up = up_scratch.room<float>(rows * inner);
    project<2>(run, {{{&block.gate, gate}, {&block.up, up}}},
               [&](int64_t row, float* out) {
                   normalise(state + row * columns, block.norms.before_mlp, columns, block.epsilon, out);
               },
               rows);
    float* down = down_scratch.room<float>(rows * columns);
    project<1>(run, {{{&block.down, down}}},
               [&](int64_t row, float* out) {
                   run.kernels.gate(block.activation, gate + row * inner, up + row * inner, inner, out);
               },
               rows);
    normalise_rows(down, block.norms.after_mlp, rows, columns, block.epsilon);
    for (int64_t i = 0; i < rows * columns; ++i) state[i] += block.residual * down[i];
    write_numbers(state, rows * columns, hidden.type, output, 0);
}

}  // namespace

void decode_heads(const Run& run, const DecoderBlock& block, const Hidden& hidden, const Positions& positions,
                  float* queries, const Fresh& keys, const Fresh& values) {
    thread_local Scratch key_scratch, value_scratch, angle_scratch;
    const int64_t columns = block.columns(), size = block.head_size, heads = block.key_heads();
    float* key = key_scratch.room<float>(hidden.rows * heads * size);
    float* value = value_scratch.room<float>(hidden.rows * heads * size);
    const FillRow fill = [&](int64_t row, float* out) {
        read_numbers(hidden.values, hidden.type, row * columns, columns, out);
        normalise(out, block.norms.before_attention, columns, block.epsilon, out);
    };
    project<3>(run, {{{&block.query, queries}, {&block.key, key}, {&block.value, value}}}, fill, hidden.rows);
    const Norms& norms = block.norms;
    if (norms.joint) {
        normalise_rows(queries, norms.query, hidden.rows, block.query_heads() * size, block.epsilon);
        normalise_rows(key, norms.key, hidden.rows, heads * size, block.epsilon);
    }
    float* cosines = angle_scratch.room<float>(2 * size);
    float* sines = cosines + size;
    for (int64_t row = 0; row < hidden.rows; ++row) {
        read_numbers(positions.cosines, positions.type, row * positions.stride, size, cosines);
        read_numbers(positions.sines, positions.type, row * positions.stride, size, sines);
        const auto normalise_and_turn = [&](float* head, const float* norm) {
            if (!norms.joint) normalise(head, norm, size, block.epsilon, head);
            if (block.turned) turn(head, cosines, sines, size);
        };
        for (int64_t i = 0; i < block.query_heads(); ++i)
            normalise_and_turn(queries + (row * block.query_heads() + i) * size, norms.query);
        for (int64_t i = 0; i < heads; ++i) {
            const int64_t at = (row * heads + i) * size;
            normalise_and_turn(key + at, norms.key);
            write_numbers(key + at, size, hidden.type, keys.values, row * keys.row_stride + i * keys.head_stride);
            write_numbers(value + at, size, hidden.type, values.values,
                          row * values.row_stride + i * values.head_stride);
        }
    }
}

void decode_rest(const Run& run, const DecoderBlock& block, const Hidden& hidden, const float* queries,
                 const Cached& keys, const Cached& values, int64_t tokens, void* output) {
    Pool::shared().together(run.threads, [&] {
        attend_and_mix(run, block, hidden, queries, keys, values, tokens, output);
    });
}

}  // namespace shiftadd
