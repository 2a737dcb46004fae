// What a set of kernels for one instruction set offers, and what it is given.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace shiftadd {

// Types of activations.
enum class Number { kFloat32, kBFloat16 };

// What the gate of an MLP goes through: x / (1 + e^-x), or the form of the Gaussian error unit with tanh.
enum class Activation { kSilu, kGeluTanh };

// One compressed matrix; pointers into tensors that the caller keeps alive. See `layout.h`.
struct Matrix {
    Layout layout;
    const uint32_t* words;
    const uint8_t* scale_codes;  // one of these two
    const float* scales;
    const float* offsets;    // or null
    const float* row_scale;  // [rows]
    const float* bias;       // [rows], or null
};

// Activations of a few rows, made ready for look-up: `batch` of them at a stride.
struct Lookups {
    int batch;
    // [batch][padded_columns / 4][16] sums ± ± ± ±, in float32 or in units of `units` (fast).
    const float* exact;
    const int16_t* fast;
    const float* units;  // [batch][chunks]
    const float* sums;   // [batch][chunks] of the activations of each chunk
    float* output;       // [batch][rows], float32
};

// Activations of many rows: `values` holds chunk after chunk, each [batch][columns of the chunk].
struct Panel {
    int64_t batch;
    const float* values;
    const uint16_t* halves;  // instead, for `multiply_half`: bfloat16
    float* output;           // [batch][rows], float32
};

// One head's query and what it may attend to.
struct Attention {
    const float* query;          // [size]
    const void *keys, *values;   // [tokens][size], each token so many numbers after the one before
    int64_t tokens, key_stride, value_stride, size;
    Number type;                 // of keys and values
    float scale;                 // of the products with keys
    float* scores;               // room for [tokens]
    float* output;               // [size]
};

// Rows of 8-bit codes [rows][columns] and activations [batch][columns]; `sums` [batch][rows], at a stride.
struct Codes {
    const int8_t* codes;
    int64_t rows, columns;
    const float* x;
    int64_t batch;
    float* sums;
    int64_t stride;
};

// Some tokens' rows of numbers [tokens][columns]: `count` of them from the first on.
struct Tokens {
    const void* values;
    Number type;
    int64_t columns;
    const float* roots;  // by which each token's row is multiplied, or null
    int64_t first, count;
};

// Sums over tokens of products of two columns, by tiles: `rows` columns on the left with `width` on the right; see
// moments_impl.h. Packed values are 32 bits, one for so many tokens.
struct MomentKernels {
    int rows, width, tokens;
    void (*pack_left)(const Tokens&, int64_t tile, void* out);
    void (*pack_right)(const Tokens&, int64_t panel, void* out);
    // sums[rows][columns] at a stride += the products of the first so many columns of a tile and of a panel.
    void (*add)(const void* left, const void* right, int64_t tokens, float* sums, int64_t stride, int rows, int columns);
};

// Some columns that settle on levels one after the other, rows side by side: all matrices [columns][rows] but
// `coupling`. Column i takes the level nearest to its goal, which is what `goals` holds of it, corrected by columns
// before it, and moves the goals of each later column j by -coupling[i][j] times its step:
//
//     sweep      the goal itself, and the step is (goal - level) / coupling[i][i]
//     descent    value + goal / coupling[i][i], the goals being gradients, and the step is level - value
struct Stretch {
    bool descend;
    int64_t columns, rows;
    const float* goals;
    const float* coupling;  // [columns][columns] at a stride, used from the diagonal rightwards
    int64_t coupling_stride;
    const float *levels, *midpoints;  // [levels][groups][rows] and [levels - 1][groups][rows], ascending
    int64_t level_count, group_count;
    const int64_t* groups;  // [columns], of each column
    float* values;          // what columns settle on; for the descent they are set before
    uint8_t* ranks;         // the places of these levels
    float* steps;
};

struct Kernels {
    const char* name;
    // Rows of activations up to which looking up beats decoding and multiplying, for so many planes; measured.
    int64_t (*most_lookups)(int bits, bool fast);

    // Each column times its sign, then 2^-k H on every `order` columns: the rotation of shiftadd_cli/bcq/rotation.py.
    void (*rotate)(float* row, const float* signs, int64_t columns, int64_t order);
    // Writes the tables of one padded row [padded_columns].
    void (*build_exact)(const float* row, int64_t columns, float* tables);
    // The same in 16 bits: a unit per chunk, so small that no sum over the chunk leaves the range.
    void (*build_fast)(const Layout&, const float* row, int16_t* tables, float* units);
    // Sums of the chunks of one padded row.
    void (*sum_chunks)(const Layout&, const float* row, float* sums);
    // Rows of one stripe of the output.
    void (*look_up)(const Matrix&, const Lookups&, int64_t stripe);
    void (*look_up_fast)(const Matrix&, const Lookups&, int64_t stripe);
    // Rows of one block of the output, from weights decoded in cache.
    void (*multiply)(const Matrix&, const Panel&, int64_t block);
    // The same in products of bfloat16 numbers, summed in float32; null where the processor has none.
    void (*multiply_half)(const Matrix&, const Panel&, int64_t block);

    // Products of all rows with all activations.
    void (*dot_codes)(const Codes&);
    // The mean of the values, each weighted by the softmax of its key's scaled product with the query.
    void (*attend)(const Attention&);
    // activation(gate) * up, number by number; `out` may be either.
    void (*gate)(Activation, const float* gate, const float* up, int64_t count, float* out);

    // Columns of strip number `strip` of so many rows; `room` [columns][settle_rows].
    int settle_rows;
    void (*settle)(const Stretch&, int64_t strip, float* room);

    MomentKernels moments;
    // Of bfloat16 numbers without roots; `add` is null where the processor has no products of theirs.
    MomentKernels moments_half;
};

const Kernels* portable_kernels();
// Each in builds for its architecture only.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* neon_kernels();

}  // namespace shiftadd
