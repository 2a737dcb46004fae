// The memory layout of a compressed matrix for multiplication.
//
// A block is 32 rows. A stripe is 4 blocks, or 8 for trellis-coded planes; the last stripe may have fewer. Groups of
// columns are padded to whole words of 16 columns and cut into chunks of at most 8 words (128 columns), so that the
// tables of a chunk stay in the L1 cache while the blocks of a stripe use them. The bits of stored planes are in the
// order in which they are read:
//
//     words   uint32  [stripe][group][chunk][block][word][plane][16]      planes
//                     [stripe][group][chunk][word][plane][block][16]      trellis-coded planes, after a lead of 16
//
// Entry j holds 16 columns of row 2j of its block in its low half and of row 2j + 1 in its high half, lowest column in
// the least significant bit, 1 for +1. Padding rows and columns are 0. The rows of a stripe are thus consecutive 16-bit
// numbers, and for trellis-coded planes "d rows above" is the same load 2d bytes earlier. The lead makes that a valid
// address in the first block too, where such rows count as 0.
//
// Scales and offsets are stored by block, even rows before odd ones:
//
//     scales  uint8   [block][group][plane][2][16]   2^-e ± 2^-(e+d) as e | d << 4 | minus << 7; e = 15: 0; d = 0: 2^-e
//             float32 [block][group][plane][2][16]   for scales of other forms
//     offsets float32 [block][group][2][16]          or none
//     row_scale, bias  float32 [rows]
//
// where the planes of scales are computed ones. The order of planes inside words follows shiftadd_cli/bcq/weight.py.
// In-register look-up of four columns at a time follows T-MAC (arXiv:2407.00088, section 3), here also with 32-bit
// tables, which are exact. 16-bit tables cover as many columns as a permutation can index, see `HalfTables`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shiftadd {

constexpr int kBlockRows = 32;
constexpr int kStripeBlocks = 4, kTrellisStripeBlocks = 8;
constexpr int kWordColumns = 16;
constexpr int kChunkWords = 8;
constexpr int kChunkColumns = kChunkWords * kWordColumns;
constexpr int kLookupColumns = 4;                 // columns per look-up
constexpr int kTable = 1 << kLookupColumns;       // entries of its table
constexpr int kWordTables = kWordColumns / kLookupColumns;
constexpr int kPairs = kBlockRows / 2;            // entries per word, plane and block

// Distances in entries of `words`.
struct Strides {
    int64_t block, word, plane;
};

struct Layout {
    int64_t rows, columns, group_columns;
    int bits;    // stored planes
    int planes;  // computed planes, more than `bits` if they are trellis-coded

    bool coded() const { return planes > bits; }
    int64_t lead() const { return coded() ? kPairs : 0; }
    int most_stripe_blocks() const { return coded() ? kTrellisStripeBlocks : kStripeBlocks; }

    int64_t groups() const { return (columns + group_columns - 1) / group_columns; }
    int64_t group_words() const { return (group_columns + kWordColumns - 1) / kWordColumns; }
    int64_t group_chunks() const { return (group_words() + kChunkWords - 1) / kChunkWords; }
    int64_t chunks() const { return groups() * group_chunks(); }
    int64_t padded_words() const { return groups() * group_words(); }
    int64_t padded_columns() const { return padded_words() * kWordColumns; }
    int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
    int64_t stripes() const { return (blocks() + most_stripe_blocks() - 1) / most_stripe_blocks(); }
    int stripe_blocks(int64_t stripe) const {
        const int64_t left = blocks() - stripe * most_stripe_blocks();
        return static_cast<int>(left < most_stripe_blocks() ? left : most_stripe_blocks());
    }
    // The number of words of a chunk; `chunk` is its index in its group.
    int chunk_words(int64_t chunk) const {
        int64_t left = group_words() - chunk * kChunkWords;
        return static_cast<int>(left < kChunkWords ? left : kChunkWords);
    }
    // In a chunk of `words` words of a stripe of `blocks` blocks.
    Strides strides(int64_t words, int64_t blocks) const {
        if (coded()) return {kPairs, blocks * kPairs * bits, blocks * kPairs};
        return {words * kPairs * bits, kPairs * bits, kPairs};
    }
    // Entries of `words` for one word of one block, and before a stripe.
    int64_t word_entries() const { return static_cast<int64_t>(bits) * kPairs; }
    int64_t stripe_start(int64_t stripe) const {
        return lead() + stripe * most_stripe_blocks() * padded_words() * word_entries();
    }
    int64_t entries() const { return lead() + blocks() * padded_words() * word_entries(); }
    int64_t bytes() const { return entries() * static_cast<int64_t>(sizeof(uint32_t)); }  // of all stored planes
};

// Calls `visit(group, first_word, words)` for every chunk in storage order; `first_word` counts padded words.
template <class Visit>
void for_each_chunk(const Layout& layout, Visit visit) {
    for (int64_t group = 0; group < layout.groups(); ++group)
        for (int64_t chunk = 0; chunk < layout.group_chunks(); ++chunk)
            visit(group, group * layout.group_words() + chunk * kChunkWords, layout.chunk_words(chunk));
}

}  // namespace shiftadd
