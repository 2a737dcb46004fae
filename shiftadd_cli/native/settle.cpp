#include "settle.h"

#include "numbers.h"
#include "pool.h"

namespace shiftadd {

void settle(const Kernels& kernels, const Stretch& stretch, const LevelTables& tables, int threads) {
    const int rows = kernels.settle_rows;
    Pool::shared().run((stretch.rows + rows - 1) / rows, threads, [&](int64_t strip) {
        thread_local Scratch scratch;
        kernels.settle(stretch, tables, strip, scratch.room<float>(stretch.columns * rows));
    });
}

void settle(const Kernels& kernels, const Stretch& stretch, const Paths& paths, int threads) {
    Pool::shared().run((stretch.rows + paths.stripe - 1) / paths.stripe, threads, [&](int64_t stripe) {
        thread_local PathScratch scratch;
        kernels.settle_path(stretch, paths, stripe, scratch);
    });
}

}  // namespace shiftadd
