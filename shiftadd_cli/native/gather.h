// Rows of a compressed matrix as numbers: the look-ups of an embedding.
#pragma once

#include "kernels.h"

namespace shiftadd {

// Decodes row `row` of the planes to `out` [columns]. Plane after plane is added in ascending order, then the offset,
// and the sum is multiplied by the row scale, so that the bits are those of the reference in shiftadd_cli/bcq/weight.py.
void gather_row(const Matrix& matrix, int64_t row, float* out);

}  // namespace shiftadd
