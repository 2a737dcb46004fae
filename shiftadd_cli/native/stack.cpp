#include "stack.h"

#include "pool.h"

namespace shiftadd {

void decode_stack(const Run& run, const DecoderStack& stack, const Hidden& hidden, const Positions& positions,
                  const std::vector<BlockCache>& caches, int64_t tokens, void* output) {
    thread_local Scratch query_scratch;
    const DecoderBlock& first = *stack.blocks.front();
    const int64_t size = first.head_size;
    const int64_t token_bytes = size * (hidden.type == Number::kFloat32 ? sizeof(float) : sizeof(uint16_t));
    float* queries = query_scratch.room<float>(hidden.rows * first.query_heads() * size);
    // One team for all blocks: waking it for each block takes longer than some blocks.
    Pool::shared().together(run.threads, [&] {
        Hidden input = hidden;
        for (size_t i = 0; i < stack.blocks.size(); ++i) {
            const BlockCache& cache = caches[i];
            const int64_t head_stride = cache.capacity * size;
            const int64_t row_stride = hidden.consecutive ? 0 : first.key_heads() * head_stride;
            const auto fresh = [&](void* all) {
                return Fresh{static_cast<char*>(all) + tokens * token_bytes, hidden.consecutive ? size : row_stride,
                             head_stride};
            };
            decode_heads(run, *stack.blocks[i], input, positions, queries, fresh(cache.keys), fresh(cache.values));
            decode_rest(run, *stack.blocks[i], input, queries, {cache.keys, row_stride, head_stride, size},
                        {cache.values, row_stride, head_stride, size}, tokens + 1, output);
            input.values = output;
        }
    });
}

}  // namespace shiftadd
