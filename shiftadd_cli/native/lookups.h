// Rows of activations made ready for look-up, once for all matrices that read them.
#pragma once

#include <algorithm>
#include <functional>

#include "kernels.h"
#include "numbers.h"

namespace shiftadd {

// Rows whose tables are built at once: for 4096 columns these are 512 KB, half of a common L2 cache.
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

// One row, rotated, with every group padded to whole words by zeros: `out` [padded_columns].
void fill_padded(const Kernels& kernels, const Layout& layout, const Rotation& rotation, const FillRow& fill,
                 int64_t row, float* out);

// Tables of rows 0 to count - 1 for matrices of the width and groups of `layout`; `output` is the caller's to set.
// They live in `scratch` until it is used again. with_sums: for a matrix with offsets.
Lookups build_lookups(const Kernels& kernels, const Layout& layout, const Rotation& rotation, const FillRow& fill,
                      int count, bool fast, bool with_sums, int threads, LookupScratch& scratch);

// How many of `threads` are worth waking for matrices of so many bytes of planes in all.
int useful_threads(int threads, int64_t bytes);

}  // namespace shiftadd
