// All blocks of a decoder for one new token of each sequence, one after the other in one call.
#pragma once

#include <vector>

#include "block.h"

namespace shiftadd {

struct DecoderStack {
    std::vector<const DecoderBlock*> blocks;  // of equal sizes, in the order in which they are computed
};

// Keys and values of one block, [rows][key_heads][capacity][head_size] in the type of the activations.
struct BlockCache {
    void *keys, *values;
    int64_t capacity;
};

// What `decode_heads` and `decode_rest` do for each block. The caches, one for each block, hold `tokens` tokens, and get
// the new one behind them; `output` as `hidden`.
void decode_stack(const Run& run, const DecoderStack& stack, const Hidden& hidden, const Positions& positions,
                  const std::vector<BlockCache>& caches, int64_t tokens, void* output);

}  // namespace shiftadd
