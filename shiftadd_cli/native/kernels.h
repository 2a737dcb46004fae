// The kernels of one instruction set and their arguments.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace shiftadd {

struct PathScratch;

// Types of activations.
enum class Number { kFloat32, kBFloat16 };

// Activation function of an MLP's gate: x / (1 + e^-x), or GELU in its tanh form.
enum class Activation { kSilu, kGeluTanh };

// One compressed matrix, as pointers into tensors that the caller keeps alive. See `layout.h`.
struct Matrix {
    Layout layout;
    const uint32_t* words;
    const uint8_t* scale_codes;  // null if `scales` is set, and vice versa
    const float* scales;
    const float* offsets;    // or null
    const float* row_scale;  // [rows]
    const float* bias;       // [rows], or null
};

// How the 16 columns of a word are split into 16-bit tables, from the least significant bit up.
struct HalfTables {
    int count;
    int columns[kWordTables];

    // The first column of a table, and where it starts in the entries of its word.
    constexpr int first_column(int table) const {
        return table == 0 ? 0 : first_column(table - 1) + columns[table - 1];
    }
    constexpr int start(int table) const { return table == 0 ? 0 : start(table - 1) + (1 << columns[table - 1]); }
    // All entries of a word.
    constexpr int entries() const { return start(count); }
};

// Tables of 16 entries, the most that a byte shuffle looks up.
constexpr HalfTables kTablesOf16{4, {4, 4, 4, 4}};

// Look-up tables for `batch` rows of activations.
struct Lookups {
    int batch;
    // [batch][words][tables][2^columns] sums ± ± ... of the columns of a table: `exact` in float32, 4 columns per table;
    // `fast` in multiples of `units`, columns as in `HalfTables`.
    const float* exact;
    const int16_t* fast;
    const float* units;  // [batch][chunks]
    const float* sums;   // [batch][chunks], the sum of the activations of each chunk
    float* output;       // [batch][rows], float32
};

// Kernels that take 16 rows at a time read this far past the last row, and drop the results.
constexpr int64_t kPanelMargin = 15 * kChunkColumns;

// Activations of many rows: the chunks one after another, each [batch][columns of the chunk].
struct Panel {
    int64_t batch;
    const float* values;
    float* output;  // [batch][rows]
    // In bfloat16, in place of both, for `multiply_half`. The numbers are followed by `kPanelMargin` others.
    const uint16_t* halves;
    uint16_t* half_output;
};

// One head's query, and the keys and values that it attends to.
struct Attention {
    const float* query;          // [size]
    const void *keys, *values;   // [tokens][size], with strides between tokens
    int64_t tokens, key_stride, value_stride, size;
    Number type;                 // of keys and values
    float scale;                 // factor of the products with keys
    float* scores;               // scratch [tokens]
    float* output;               // [size]
};

// Rows of 8-bit codes [rows][columns] and activations [batch][columns]; `sums` [batch][rows], with a row stride.
struct Codes {
    const int8_t* codes;
    int64_t rows, columns;
    const float* x;
    int64_t batch;
    float* sums;
    int64_t stride;
};

// Rows of a matrix [tokens][columns]: `count` tokens, starting with `first`.
struct Tokens {
    const void* values;
    Number type;
    int64_t columns;
    const float* roots;  // one factor per token, or null
    int64_t first, count;
};

// Sums over tokens of products of two columns, in tiles of `rows` columns on the left and `width` on the right; see
// moments_impl.h. A packed value has 32 bits and holds `tokens` tokens.
struct MomentKernels {
    int rows, width, tokens;
    void (*pack_left)(const Tokens&, int64_t tile, void* out);
    void (*pack_right)(const Tokens&, int64_t panel, void* out);
    // sums[rows][columns], with a row stride, += the products of the first columns of a tile and of a panel.
    void (*add)(const void* left, const void* right, int64_t tokens, float* sums, int64_t stride, int rows,
                int columns);
};

// Columns that are quantized one after another. All matrices are [columns][rows], except `coupling`. Column i takes
// levels close to its target and then adds -coupling[i][j] times its step to the goals of each later column j:
//
//     sweep      target = goal, step = (target - level) / coupling[i][i]
//     descent    target = value + goal / coupling[i][i], where goals are gradients, step = level - value
struct Stretch {
    bool descend;
    int64_t columns, rows;
    const float* goals;
    const float* coupling;  // [columns][columns] with a row stride; only its upper triangle is used
    int64_t coupling_stride;
    const int64_t* groups;  // [columns], the group of each column
    float* values;          // the chosen levels; before a descent, the present values
    uint8_t* codes;         // the indices of these levels, or the stored bits that select them
    float* steps;
};

// Every weight takes its nearest level.
struct LevelTables {
    const float *levels, *midpoints;  // [levels][groups][rows] and [levels - 1][groups][rows], ascending
    int64_t level_count, group_count;
};

// The levels of a column are a path through a trellis; see viterbi_impl.h.
constexpr int kTrellisMemory = 6, kTrellisStates = 1 << kTrellisMemory;
constexpr int kMostTrellisBits = 4, kMostTrellisPlanes = 6;

struct TrellisCode {
    int bits, planes;
    uint16_t masks[kMostTrellisPlanes];
};

struct Paths {
    TrellisCode code;
    int64_t stripe;       // rows of a path; the last one may have fewer
    const float* levels;  // [groups][rows][2^planes], in the order of their labels
};

struct Kernels {
    const char* name;
    // The largest number of rows of activations for which look-up beats decoding and multiplying; measured.
    int64_t (*most_lookups)(int planes, bool fast);

    // Multiplies columns by their signs, then every `order` columns by 2^-k H, as in shiftadd_cli/bcq/rotation.py.
    void (*rotate)(float* row, const float* signs, int64_t columns, int64_t order);
    // Writes the tables of one padded row [padded_columns].
    void (*build_exact)(const float* row, int64_t columns, float* tables);
    // The same in 16 bits, in tables as `half_tables` has them, with a unit per chunk that keeps every sum over the
    // chunk in range.
    HalfTables half_tables;
    void (*build_fast)(const Layout&, const float* row, int16_t* tables, float* units);
    // Sums each chunk of one padded row.
    void (*sum_chunks)(const Layout&, const float* row, float* sums);
    // Computes the rows of one stripe of the output.
    void (*look_up)(const Matrix&, const Lookups&, int64_t stripe);
    void (*look_up_fast)(const Matrix&, const Lookups&, int64_t stripe);
    // Computes the rows of one block of the output, from weights decoded into the cache.
    void (*multiply)(const Matrix&, const Panel&, int64_t block);
    // The same in bfloat16, where sums are still in float32; null if the processor has no such products.
    void (*multiply_half)(const Matrix&, const Panel&, int64_t block);

    // Computes the products of all rows with all activations.
    void (*dot_codes)(const Codes&);
    // Computes the mean of the values, weighted by the softmax of the scaled products of keys and query.
    void (*attend)(const Attention&);
    // activation(gate) * up, elementwise; `out` may be one of the inputs.
    void (*gate)(Activation, const float* gate, const float* up, int64_t count, float* out);

    // Quantizes a strip of `settle_rows` rows; `room` is scratch [columns][settle_rows].
    int settle_rows;
    void (*settle)(const Stretch&, const LevelTables&, int64_t strip, float* room);
    // Quantizes a stripe.
    void (*settle_path)(const Stretch&, const Paths&, int64_t stripe, PathScratch&);

    MomentKernels moments;
    // For bfloat16 numbers without roots; `add` is null if the processor has no bfloat16 products.
    MomentKernels moments_half;
};

const Kernels* portable_kernels();
// Each exists only in builds for its architecture.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();

}  // namespace shiftadd
