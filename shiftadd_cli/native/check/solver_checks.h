// Checks of what quantizing computes by the kernels.
#pragma once

#include "problem.h"
#include "tally.h"

namespace shiftadd::check {

// Sums of products of columns against their formula, on one thread and on more.
void check_moments(const Kernels& kernels, Random& random, bool quick, Tally& tally);
// Columns that settle on levels one after the other, by what each wanted.
void check_settle(const Kernels& kernels, Random& random, Tally& tally);

}  // namespace shiftadd::check
