#include "codes.h"

#include <algorithm>

#include "pool.h"

namespace shiftadd {
namespace {

// Rows of codes per task: with 4096 columns, a quarter of a common L2 cache.
constexpr int kTaskRows = 64;

}  // namespace

void multiply_codes(const Kernels& kernels, const CodeRows& matrix, const Activations& input, void* output,
                    int threads) {
    thread_local Scratch row_scratch;
    const int64_t columns = matrix.columns;
    float* rows = row_scratch.room<float>(input.rows * columns);
    read_numbers(input.values, input.type, 0, input.rows * columns, rows);
    const int64_t tasks = (matrix.rows + kTaskRows - 1) / kTaskRows;
    Pool::shared().run(tasks, useful_threads(threads, matrix.rows * columns * input.rows), [&](int64_t task) {
        const int64_t first = task * kTaskRows, count = std::min<int64_t>(kTaskRows, matrix.rows - first);
        alignas(64) float sums[kTileRows][kTaskRows];
        float scale[kTaskRows];
        read_numbers(matrix.scale, matrix.scale_type, first, count, scale);
        for (int64_t row = 0; row < input.rows; row += kTileRows) {
            const int batch = static_cast<int>(std::min<int64_t>(kTileRows, input.rows - row));
            kernels.dot_codes({matrix.codes + first * columns, count, columns, rows + row * columns, batch, sums[0],
                               kTaskRows});
            for (int b = 0; b < batch; ++b) {
                for (int64_t i = 0; i < count; ++i) sums[b][i] *= scale[i];
                write_numbers(sums[b], count, input.type, output, (row + b) * matrix.rows + first);
            }
        }
    });
}

}  // namespace shiftadd
