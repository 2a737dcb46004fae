// Second moments of activations, which quantizing a layer needs: sums over tokens of products of two columns.
#pragma once

#include "kernels.h"

namespace shiftadd {

// hessian[i][j] += sum of x_i x_j for i <= j; what is below the diagonal is left undefined. With `other`, of the shape
// and type of `x`, cross[i][j] += sum of other_i x_j. Both [columns][columns], float32; products and sums in float32,
// of bfloat16 numbers without roots in the processor's products of pairs, where it has them.
// `threads` do not change a bit of it.
void add_moments(const Kernels& kernels, const Tokens& x, const void* other, float* hessian, float* cross, int threads);

}  // namespace shiftadd
