// The steps of the solver that go column by column: the compensated sweep and coordinate descent.
#pragma once

#include "kernels.h"

namespace shiftadd {

// See `Stretch`. Neither `threads` nor other calls at the same time change a bit of it.
void settle(const Kernels& kernels, const Stretch& stretch, int threads);

}  // namespace shiftadd
