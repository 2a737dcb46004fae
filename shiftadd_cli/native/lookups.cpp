#include "lookups.h"

#include "pool.h"

namespace shiftadd {
namespace {

// Bytes of planes that are worth waking another thread.
constexpr int64_t kBytesPerThread = 48 << 10;

}  // namespace

int useful_threads(int threads, int64_t bytes) {
    return static_cast<int>(std::min<int64_t>(threads, 1 + bytes / kBytesPerThread));
}

void fill_padded(const Kernels& kernels, const Layout& layout, const Rotation& rotation, const FillRow& fill,
                 int64_t row, float* out) {
    const int64_t padded = layout.group_words() * kWordColumns;
    if (padded == layout.group_columns && layout.padded_columns() == layout.columns) {
        fill(row, out);
        if (rotation.signs) kernels.rotate(out, rotation.signs, layout.columns, rotation.order);
        return;
    }
    thread_local Scratch plain_scratch;
    float* plain = plain_scratch.room<float>(layout.columns);
    fill(row, plain);
    if (rotation.signs) kernels.rotate(plain, rotation.signs, layout.columns, rotation.order);
    for (int64_t group = 0; group < layout.groups(); ++group, out += padded) {
        const int64_t first = group * layout.group_columns;
        const int64_t count = std::min(layout.group_columns, layout.columns - first);
        std::memcpy(out, plain + first, count * sizeof(float));
        std::fill(out + count, out + padded, 0.0f);
    }
}

Lookups build_lookups(const Kernels& kernels, const Layout& layout, const Rotation& rotation, const FillRow& fill,
                      int count, bool fast, bool with_sums, int threads, LookupScratch& scratch) {
    const int64_t columns = layout.padded_columns(), chunks = layout.chunks();
    const int64_t word_entries = fast ? kernels.half_tables.entries() : kWordTables * kTable;
    const int64_t tables = columns / kWordColumns * word_entries;
    float* rows = scratch.rows.room<float>(count * columns);
    float* sums = with_sums ? scratch.sums.room<float>(count * chunks) : nullptr;
    float* units = fast ? scratch.units.room<float>(count * chunks) : nullptr;
    float* exact = fast ? nullptr : scratch.tables.room<float>(count * tables);
    int16_t* halves = fast ? scratch.tables.room<int16_t>(count * tables) : nullptr;
    Pool::shared().run(count, threads, [&](int64_t b) {
        float* row = rows + b * columns;
        fill_padded(kernels, layout, rotation, fill, b, row);
        if (sums) kernels.sum_chunks(layout, row, sums + b * chunks);
        if (fast) kernels.build_fast(layout, row, halves + b * tables, units + b * chunks);
        else kernels.build_exact(row, columns, exact + b * tables);
    });
    return {count, exact, halves, units, sums, nullptr};
}

}  // namespace shiftadd
