// One decoder block of the Llama family for few new tokens, in two steps: between them, the caller updates its cache of
// keys and values. Everything between input and output is float32. Each row is computed as if it were alone, so a token
// gets the same bits whether it is decoded with others or by itself.
#pragma once

#include "lookups.h"

namespace shiftadd {

struct Projection {
    Matrix matrix;
    Rotation rotation;  // of its input
};

// Weights of root-mean-square norms: of the inputs and outputs of attention and the MLP [columns], and of queries and
// keys, per head [head_size] or (joint) over all their heads as one row. Each may be null.
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
    float scale;          // factor of the products of queries and keys
    float residual;       // factor of the outputs of attention and the MLP
    bool turned;          // whether queries and keys are rotated by their positions

    int64_t columns() const { return query.matrix.layout.columns; }
    int64_t query_heads() const { return query.matrix.layout.rows / head_size; }
    int64_t key_heads() const { return key.matrix.layout.rows / head_size; }
};

// Activations [rows][columns], at most kTileRows: the next token of each of several sequences, or consecutive tokens of
// one sequence.
struct Hidden {
    const void* values;
    Number type;
    int rows;
    bool consecutive;
};

// Rotary position embeddings [head_size] for each row, or for all rows (stride 0).
struct Positions {
    const void *cosines, *sines;
    Number type;
    int64_t stride;
};

// Keys and values [sequences][key_heads][tokens][head_size] in the type of the activations; strides in numbers. The
// row stride leads from the sequence of one row to that of the next: 0 for consecutive tokens.
struct Cached {
    const void* values;
    int64_t row_stride, head_stride, token_stride;
};

// Destination of the new keys or values: head `h` of row `r` starts at `r * row_stride + h * head_stride`.
struct Fresh {
    void* values;
    int64_t row_stride, head_stride;
};

struct Run {
    const Kernels& kernels;
    bool fast;    // look up in 16-bit tables
    int threads;
};

// First step: queries [rows][query heads][head_size] in float32, keys and values in the type of the activations.
// Queries and keys are rotated by the positions.
void decode_heads(const Run& run, const DecoderBlock& block, const Hidden& hidden, const Positions& positions,
                  float* queries, const Fresh& keys, const Fresh& values);

// Second step: attention, the MLP and both residuals. The queries of the first row see `tokens` keys and values, as
// those of the other rows do; of consecutive tokens, each sees one more than the token before it. `output` has the form
// of `hidden` and may overwrite it.
void decode_rest(const Run& run, const DecoderBlock& block, const Hidden& hidden, const float* queries,
                 const Cached& keys, const Cached& values, int64_t tokens, void* output);

}  // namespace shiftadd
