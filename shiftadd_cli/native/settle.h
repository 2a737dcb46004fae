// The column-by-column steps of the solver: the compensated sweep and coordinate descent.
#pragma once

#include "kernels.h"

namespace shiftadd {

// See `Stretch`. The bits of the results depend neither on `threads` nor on concurrent calls.
void settle(const Kernels& kernels, const Stretch& stretch, const LevelTables& tables, int threads);
void settle(const Kernels& kernels, const Stretch& stretch, const Paths& paths, int threads);

}  // namespace shiftadd
