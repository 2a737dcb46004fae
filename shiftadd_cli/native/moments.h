// Second moments of activations, for quantizing a layer: sums over tokens of products of two columns.
#pragma once

#include "kernels.h"

namespace shiftadd {

// hessian[i][j] += sum of x_i x_j for i <= j; elements below the diagonal are undefined. With `other`, of the shape and
// type of `x`, cross[i][j] += sum of other_i x_j. Both are float32 [columns][columns]. Products and sums are float32;
// bfloat16 numbers without roots use the processor's products of pairs, if it has them. The bits do not depend on
// `threads`.
void add_moments(const Kernels& kernels, const Tokens& x, const void* other, float* hessian, float* cross, int threads);

}  // namespace shiftadd
