#include "gather.h"

#include <algorithm>
#include <bit>

#include "numbers.h"
#include "trellis_masks.h"

namespace shiftadd {
namespace {

constexpr int kMostPlanes = 8;

}  // namespace

void gather_row(const Matrix& m, int64_t row, float* out) {
    const Layout& layout = m.layout;
    const int64_t stripe = row / (layout.most_stripe_blocks() * kBlockRows), block = row / kBlockRows;
    const int64_t first_block = stripe * layout.most_stripe_blocks(), inside = row - first_block * kBlockRows;
    const int blocks = layout.stripe_blocks(stripe);
    const int64_t place = row % 2 * kPairs + row % kBlockRows / 2;  // even rows of a block come first in its scales
    const unsigned* masks = trellis_masks(layout.bits, layout.planes);
    int64_t chunk_start = layout.stripe_start(stripe);
    for_each_chunk(layout, [&](int64_t group, int64_t first_word, int words) {
        const Strides strides = layout.strides(words, blocks);
        float scales[kMostPlanes];
        for (int plane = 0; plane < layout.planes; ++plane) {
            const int64_t at = ((block * layout.groups() + group) * layout.planes + plane) * kBlockRows + place;
            scales[plane] = m.scale_codes ? decode_scale(m.scale_codes[at]) : m.scales[at];
        }
        const float offset = m.offsets ? m.offsets[(block * layout.groups() + group) * kBlockRows + place] : 0.0f;
        // 16 columns of a stored plane, of the row that is `above` rows higher: the rows of a block are consecutive
        // 16-bit numbers, and so are those of a stripe of trellis-coded planes.
        const auto stored = [&](int word, int plane, int64_t above) -> unsigned {
            if (above > inside) return 0;
            const int64_t from = inside - above;
            const uint32_t* entries = m.words + chunk_start + from / kBlockRows * strides.block +
                                      word * strides.word + plane * strides.plane + from % kBlockRows / 2;
            return *entries >> (16 * (from % 2)) & 0xffff;
        };
        const int64_t group_start = group * layout.group_columns;
        const int64_t end = std::min(group_start + layout.group_columns, layout.columns);
        for (int word = 0; word < words; ++word) {
            float sums[kWordColumns] = {};
            for (int plane = 0; plane < layout.planes; ++plane) {
                unsigned signs = 0;
                if (masks)
                    for (unsigned mask = masks[plane]; mask; mask &= mask - 1) {
                        const int tap = std::countr_zero(mask);
                        signs ^= stored(word, tap % layout.bits, tap / layout.bits);
                    }
                else
                    signs = stored(word, plane, 0);
                for (int c = 0; c < kWordColumns; ++c) sums[c] += signs >> c & 1 ? scales[plane] : -scales[plane];
            }
            const int64_t column = group_start + (first_word - group * layout.group_words() + word) * kWordColumns;
            for (int64_t c = 0; c < std::min<int64_t>(kWordColumns, end - column); ++c)
                out[column + c] = (sums[c] + offset) * m.row_scale[row];
        }
        chunk_start += blocks * words * layout.word_entries();
    });
}

}  // namespace shiftadd
