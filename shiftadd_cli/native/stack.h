// All blocks of a decoder for few new tokens, in one call.
#pragma once

#include <vector>

#include "block.h"

namespace shiftadd {

struct DecoderStack {
    std::vector<const DecoderBlock*> blocks;  // of equal sizes, in the order of computation
};

// Keys and values of one block, [sequences][key_heads][capacity][head_size] in the type of the activations.
struct BlockCache {
    void *keys, *values;
    int64_t capacity;
};

// Runs `decode_heads` and `decode_rest` for each block. The caches, one per block, hold `tokens` tokens; the new tokens
// are appended. `output` has the form of `hidden`.
void decode_stack(const Run& run, const DecoderStack& stack, const Hidden& hidden, const Positions& positions,
                  const std::vector<BlockCache>& caches, int64_t tokens, void* output);

}  // namespace shiftadd
