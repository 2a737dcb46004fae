// Look-up tables of rows of activations, built once for all matrices that use them.
#pragma once

#include <algorithm>
#include <functional>

#include "kernels.h"
#include "numbers.h"

namespace shiftadd {

// Rows whose tables are built together: 512 KB for 4096 columns, half of a common L2 cache.
constexpr int kTileRows = 8;

// The rotation of an input: signs [columns], or null; `order` of its Hadamard matrix.
struct Rotation {
    const float* signs;
    int64_t order;
};

struct LookupScratch {
    Scratch rows, tables, units, sums;
};

// Writes row number `row` [columns] as float32.
using FillRow = std::function<void(int64_t row, float* out)>;

// Writes one rotated row to `out` [padded_columns], with every group padded to whole words by zeros.
void fill_padded(const Kernels& kernels, const Layout& layout, const Rotation& rotation, const FillRow& fill,
                 int64_t row, float* out);

// Tables of rows 0 to count - 1 for matrices with the width and groups of `layout`; the caller sets `output`. The
// tables stay in `scratch` until its next use. with_sums: for a matrix with offsets.
Lookups build_lookups(const Kernels& kernels, const Layout& layout, const Rotation& rotation, const FillRow& fill,
                      int count, bool fast, bool with_sums, int threads, LookupScratch& scratch);

// The number of threads, at most `threads`, that are worth waking for planes of `bytes` bytes in total.
int useful_threads(int threads, int64_t bytes);

}  // namespace shiftadd
