// The memory layout of a compressed matrix for multiplication.
//
// A block is 32 rows; a stripe is 4 blocks (the last stripe may have fewer). Groups of columns are padded to whole
// words of 16 columns and cut into chunks of at most 8 words (128 columns), so that the look-up tables of a chunk stay
// in the L1 cache while the blocks of a stripe use them. Plane bits are stored in the order in which they are read:
//
//     words   uint32  [stripe][group][chunk][block][word][plane][16]
//
// Entry j holds 16 columns of row j of its block in its low half and of row j + 16 in its high half, lowest column in
// the least significant bit, 1 for +1. Padding rows and columns are 0. Scales and offsets are stored by block:
//
//     scales  uint8   [block][group][plane][32]   2^-e ± 2^-(e+d) as e | d << 4 | minus << 7; e = 15: 0; d = 0: 2^-e
//             float32 [block][group][plane][32]   for scales of other forms
//     offsets float32 [block][group][32]          or none
//     row_scale, bias  float32 [rows]
//
// The order of planes inside words follows shiftadd_cli/bcq/weight.py. In-register look-up of four columns at a time
// follows T-MAC (arXiv:2407.00088, section 3), here with 32-bit tables, which are exact.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shiftadd {

constexpr int kBlockRows = 32;
constexpr int kStripeBlocks = 4;
constexpr int kWordColumns = 16;
constexpr int kChunkWords = 8;
constexpr int kChunkColumns = kChunkWords * kWordColumns;
constexpr int kLookupColumns = 4;                 // columns per look-up
constexpr int kTable = 1 << kLookupColumns;       // entries of its table
constexpr int kWordTables = kWordColumns / kLookupColumns;
constexpr int kPairs = kBlockRows / 2;            // entries per word and plane

struct Layout {
    int64_t rows, columns, group_columns;
    int bits;

    int64_t groups() const { return (columns + group_columns - 1) / group_columns; }
    int64_t group_words() const { return (group_columns + kWordColumns - 1) / kWordColumns; }
    int64_t group_chunks() const { return (group_words() + kChunkWords - 1) / kChunkWords; }
    int64_t chunks() const { return groups() * group_chunks(); }
    int64_t padded_words() const { return groups() * group_words(); }
    int64_t padded_columns() const { return padded_words() * kWordColumns; }
    int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
    int64_t stripes() const { return (blocks() + kStripeBlocks - 1) / kStripeBlocks; }
    int stripe_blocks(int64_t stripe) const {
        int64_t left = blocks() - stripe * kStripeBlocks;
        return static_cast<int>(left < kStripeBlocks ? left : kStripeBlocks);
    }
    // The number of words of a chunk; `chunk` is its index in its group.
    int chunk_words(int64_t chunk) const {
        int64_t left = group_words() - chunk * kChunkWords;
        return static_cast<int>(left < kChunkWords ? left : kChunkWords);
    }
    // Entries of `words` for one word of one block, and before a stripe.
    int64_t word_entries() const { return static_cast<int64_t>(bits) * kPairs; }
    int64_t stripe_start(int64_t stripe) const {
        return stripe * kStripeBlocks * padded_words() * word_entries();
    }
    int64_t entries() const { return blocks() * padded_words() * word_entries(); }
    int64_t bytes() const { return entries() * static_cast<int64_t>(sizeof(uint32_t)); }  // of all planes
};

// Calls `visit(group, first_word, words)` for every chunk in storage order; `first_word` counts padded words.
template <class Visit>
void for_each_chunk(const Layout& layout, Visit visit) {
    for (int64_t group = 0; group < layout.groups(); ++group)
        for (int64_t chunk = 0; chunk < layout.group_chunks(); ++chunk)
            visit(group, group * layout.group_words() + chunk * kChunkWords, layout.chunk_words(chunk));
}

}  // namespace shiftadd
