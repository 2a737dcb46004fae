#include "pack.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace shiftadd {
namespace {

// Bits `first` to `first + count` (at most 16) of a row of bytes.
uint32_t read_bits(const uint8_t* row, int64_t first, int64_t count) {
    uint32_t bits = 0;
    for (int64_t byte = first / 8; byte <= (first + count - 1) / 8; ++byte) {
        int64_t shift = byte * 8 - first;
        uint32_t value = row[byte];
        bits |= shift < 0 ? value >> -shift : value << shift;
    }
    return bits & ((1u << count) - 1);
}

void write_bits(uint8_t* row, int64_t first, int64_t count, uint32_t value) {
    for (int64_t byte = first / 8; byte <= (first + count - 1) / 8; ++byte) {
        int64_t shift = byte * 8 - first;
        row[byte] |= static_cast<uint8_t>(shift < 0 ? value << -shift : value >> shift);
    }
}

// Calls `visit(row, plane, first column, columns, entry, high half)` for all bits of a stripe that lie in the matrix.
template <class Visit>
void for_each_half(const Layout& layout, int64_t stripe, Visit visit) {
    int64_t chunk_start = layout.stripe_start(stripe);
    const int blocks = layout.stripe_blocks(stripe);
    for_each_chunk(layout, [&](int64_t group, int64_t first_word, int words) {
        const Strides strides = layout.strides(words, blocks);
        const int64_t group_end = group * layout.group_columns + layout.group_columns;
        const int64_t end = group_end < layout.columns ? group_end : layout.columns;
        const int64_t inside = first_word - group * layout.group_words();
        for (int block = 0; block < blocks; ++block) {
            const int64_t first_row = (stripe * layout.most_stripe_blocks() + block) * kBlockRows;
            for (int word = 0; word < words; ++word) {
                const int64_t column = group * layout.group_columns + (inside + word) * kWordColumns;
                const int64_t count = end - column < kWordColumns ? end - column : kWordColumns;
                for (int plane = 0; plane < layout.bits; ++plane) {
                    const int64_t start =
                        chunk_start + block * strides.block + word * strides.word + plane * strides.plane;
                    for (int pair = 0; pair < kPairs; ++pair)
                        for (int high = 0; high < 2; ++high) {
                            const int64_t row = first_row + 2 * pair + high;
                            if (row < layout.rows && count > 0) visit(row, plane, column, count, start + pair, high);
                        }
                }
            }
        }
        chunk_start += blocks * words * layout.word_entries();
    });
}

}  // namespace

void pack_stripe(const Layout& layout, const uint8_t* codes, uint32_t* words, int64_t stripe) {
    const int64_t row_bytes = (layout.columns + 7) / 8;
    if (stripe == 0) std::memset(words, 0, layout.lead() * sizeof(uint32_t));
    const int64_t start = layout.stripe_start(stripe);
    const int64_t entries = layout.stripe_blocks(stripe) * layout.padded_words() * layout.word_entries();
    std::memset(words + start, 0, entries * sizeof(uint32_t));
    for_each_half(layout, stripe, [&](int64_t row, int plane, int64_t column, int64_t count, int64_t entry, int high) {
        const uint8_t* bytes = codes + (row * layout.bits + plane) * row_bytes;
        words[entry] |= read_bits(bytes, column, count) << (16 * high);
    });
}

void unpack_stripe(const Layout& layout, const uint32_t* words, uint8_t* codes, int64_t stripe) {
    const int64_t row_bytes = (layout.columns + 7) / 8;
    const int64_t first = stripe * layout.most_stripe_blocks() * kBlockRows;
    const int64_t end = first + layout.stripe_blocks(stripe) * kBlockRows;
    const int64_t rows = (end < layout.rows ? end : layout.rows) - first;
    std::memset(codes + first * layout.bits * row_bytes, 0, rows * layout.bits * row_bytes);
    for_each_half(layout, stripe, [&](int64_t row, int plane, int64_t column, int64_t count, int64_t entry, int high) {
        const uint32_t value = (words[entry] >> (16 * high)) & ((1u << count) - 1);
        write_bits(codes + (row * layout.bits + plane) * row_bytes, column, count, value);
    });
}

void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Only a hint: a kernel without huge pages refuses it, which does no harm.
    madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}

}  // namespace shiftadd
