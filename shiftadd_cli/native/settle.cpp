#include "settle.h"

#include "numbers.h"
#include "pool.h"

namespace shiftadd {

void settle(const Kernels& kernels, const Stretch& stretch, int threads) {
    const int rows = kernels.settle_rows;
    Pool::shared().run((stretch.rows + rows - 1) / rows, threads, [&](int64_t strip) {
        thread_local Scratch scratch;
        kernels.settle(stretch, strip, scratch.room<float>(stretch.columns * rows));
    });
}

}  // namespace shiftadd
