#include "isa_avx512.h"

namespace shiftadd {

const Kernels* avx512_kernels() { return Kernel<Avx512>::table(); }

}  // namespace shiftadd
