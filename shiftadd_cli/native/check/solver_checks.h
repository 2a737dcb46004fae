// Checks of the kernels for quantization.
#pragma once

#include "problem.h"
#include "tally.h"

namespace shiftadd::check {

// Sums of products of columns against their formula, on one thread and on more.
void check_moments(const Kernels& kernels, Random& random, bool quick, Tally& tally);
// Columns rounded to levels one after another, against the target of each.
void check_settle(const Kernels& kernels, Random& random, Tally& tally);
// Columns that take the best path through a trellis, against the least error of all paths.
void check_paths(const Kernels& kernels, Random& random, bool quick, Tally& tally);

}  // namespace shiftadd::check
