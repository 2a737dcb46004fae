#include "moments.h"

#include <algorithm>

#include "numbers.h"
#include "pool.h"

namespace shiftadd {
namespace {

// Steps whose products are summed in registers: a panel of them has at most 32 KB, the size of an L1 cache.
constexpr int64_t kSteps = 256;

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

void add_moments(const Kernels& kernels, const Tokens& x, const void* other, float* hessian, float* cross,
                 int threads) {
    const bool half = kernels.moments_half.add && x.type == Number::kBFloat16 && !x.roots;
    const MomentKernels& k = half ? kernels.moments_half : kernels.moments;
    const int64_t columns = x.columns, tiles = parts(columns, k.rows), panels = parts(columns, k.width);
    const int64_t tile_size = kSteps * k.rows, panel_size = kSteps * k.width;
    thread_local Scratch left_scratch, other_scratch, right_scratch;
    // Packed values have four bytes in both forms.
    uint32_t* left = left_scratch.room<uint32_t>(tiles * tile_size);
    uint32_t* others = other ? other_scratch.room<uint32_t>(tiles * tile_size) : nullptr;
    uint32_t* right = right_scratch.room<uint32_t>(panels * panel_size);
    Tokens stretch = x, other_stretch = x;
    other_stretch.values = other;
    for (int64_t first = 0; first < x.count; first += kSteps * k.tokens) {
        stretch.first = other_stretch.first = x.first + first;
        stretch.count = other_stretch.count = std::min<int64_t>(kSteps * k.tokens, x.count - first);
        Pool::shared().run(tiles + panels, threads, [&](int64_t task) {
            if (task >= tiles) return k.pack_right(stretch, task - tiles, right + (task - tiles) * panel_size);
            k.pack_left(stretch, task, left + task * tile_size);
            if (other) k.pack_left(other_stretch, task, others + task * tile_size);
        });
        Pool::shared().run(panels, threads, [&](int64_t panel) {
            const int64_t column = panel * k.width;
            const int width = static_cast<int>(std::min<int64_t>(k.width, columns - column));
            const auto add = [&](const uint32_t* from, float* sums, int64_t end) {
                for (int64_t tile = 0, row = 0; row < end; ++tile, row += k.rows)
                    k.add(from + tile * tile_size, right + panel * panel_size, stretch.count,
                          sums + row * columns + column, columns,
                          static_cast<int>(std::min<int64_t>(k.rows, columns - row)), width);
            };
            add(left, hessian, column + width);
            if (other) add(others, cross, columns);
        });
    }
}

}  // namespace shiftadd
