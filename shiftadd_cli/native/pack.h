// Conversions between the stored planes of a checkpoint and the layout of `layout.h`.
#pragma once

#include "layout.h"

namespace shiftadd {

// `codes` uint8 [rows][bits][ceil(columns / 8)], as stored; `words` has room for `layout.entries()`.
void pack_stripe(const Layout& layout, const uint8_t* codes, uint32_t* words, int64_t stripe);

// The inverse; writes all bits of the rows of one stripe, padding as 0.
void unpack_stripe(const Layout& layout, const uint32_t* words, uint8_t* codes, int64_t stripe);

// Requests huge pages if the system has them: streaming a matrix then misses the TLB 512 times less often.
void advise_huge_pages(void* memory, size_t bytes);

}  // namespace shiftadd
