// One block of a decoder of the Llama family for one new token of each sequence, in two steps: the caller's cache of
// keys and values stands between them. All between input and output is float32.
#pragma once

#include "lookups.h"

namespace shiftadd {

struct Projection {
    Matrix matrix;
    Rotation rotation;  // of its input
};

// Weights of root-mean-square norms: before attention and before the MLP, and of what either gives, [columns], and of
// each head of queries and of keys [head_size], or (joint) of all their heads as one row. Each may be null.
struct Norms {
    const float *before_attention, *before_mlp, *after_attention, *after_mlp, *query, *key;
    bool joint;
};

struct DecoderBlock {
    Projection query, key, value, output, gate, up, down;
    Norms norms;
    float epsilon;        // of all norms
    Activation activation;
    int64_t head_size;
    float scale;          // of the products of queries and keys
    float residual;       // of what attention and the MLP add to the hidden state
    bool turned;          // queries and keys, by their positions

    int64_t columns() const { return query.matrix.layout.columns; }
    int64_t query_heads() const { return query.matrix.layout.rows / head_size; }
    int64_t key_heads() const { return key.matrix.layout.rows / head_size; }
};

// One row of activations for each sequence, at most kTileRows, [rows][columns].
struct Hidden {
    const void* values;
    Number type;
    int rows;
};

// Rotary position embeddings [head_size] of each row, or of all (stride 0).
struct Positions {
    const void *cosines, *sines;
    Number type;
    int64_t stride;
};

// Keys and values [rows][key_heads][tokens][head_size] in the type of the activations; strides in numbers.
struct Cached {
    const void* values;
    int64_t row_stride, head_stride, token_stride;
};

// Where keys or values of the new token go: head `h` of row `r` at `r * row_stride + h * head_stride` numbers.
struct Fresh {
    void* values;
    int64_t row_stride, head_stride;
};

struct Run {
    const Kernels& kernels;
    bool fast;    // look up in 16-bit tables
    int threads;
};

// First step: queries [rows][query heads][head_size] in float32, turned by the positions, and keys (turned) and values in
// the type of the activations.
void decode_heads(const Run& run, const DecoderBlock& block, const Hidden& hidden, const Positions& positions,
                  float* queries, const Fresh& keys, const Fresh& values);

// Second step: attention of the queries to `tokens` keys and values, the MLP and both residuals; `output` as `hidden`,
// in whose place it may be written.
void decode_rest(const Run& run, const DecoderBlock& block, const Hidden& hidden, const float* queries,
                 const Cached& keys, const Cached& values, int64_t tokens, void* output);

}  // namespace shiftadd
