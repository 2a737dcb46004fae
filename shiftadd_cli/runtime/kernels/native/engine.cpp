#include "engine.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "pool.h"

namespace shiftadd {
namespace {

// Rows whose tables are built at once: for 4096 columns these are 512 KB, half of a common L2 cache.
constexpr int kTileRows = 8;
// A second thread is worth waking for so many bytes of planes.
constexpr int64_t kBytesPerThread = 48 << 10;
constexpr std::align_val_t kAlignment{64};

// Memory that a thread keeps from call to call.
class Scratch {
public:
    // Room for `count` numbers of type T, aligned to cache lines; what was in it may be lost.
    template <class T>
    T* room(size_t count) {
        const size_t bytes = count * sizeof(T);
        if (bytes > bytes_) {
            memory_.reset();
            bytes_ = 0;  // it stays so if there is no memory
            memory_.reset(::operator new(bytes, kAlignment));
            bytes_ = bytes;
        }
        return static_cast<T*>(memory_.get());
    }

private:
    struct Free {
        void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t bytes_ = 0;
};

void read(const Activations& input, int64_t row, int64_t columns, float* out) {
    if (input.type == Number::kFloat32) {
        std::memcpy(out, static_cast<const float*>(input.values) + row * columns, columns * sizeof(float));
        return;
    }
    const uint16_t* values = static_cast<const uint16_t*>(input.values) + row * columns;
    for (int64_t i = 0; i < columns; ++i) out[i] = std::bit_cast<float>(static_cast<uint32_t>(values[i]) << 16);
}

// Rounds to nearest, ties to even; not-a-numbers stay such.
inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void write(const float* values, int64_t count, Number type, void* output, int64_t at) {
    if (type == Number::kFloat32) {
        std::memcpy(static_cast<float*>(output) + at, values, count * sizeof(float));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(output) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(values[i]);
}

// One row, rotated, with every group padded to whole words by zeros.
void read_padded(const Layout& layout, const Activations& input, int64_t row, float* out) {
    const int64_t padded = layout.group_words() * kWordColumns;
    if (padded == layout.group_columns && layout.padded_columns() == layout.columns) {
        read(input, row, layout.columns, out);
        if (input.signs) rotate(out, input.signs, layout.columns, input.order);
        return;
    }
    thread_local Scratch plain_scratch;
    float* plain = plain_scratch.room<float>(layout.columns);
    read(input, row, layout.columns, plain);
    if (input.signs) rotate(plain, input.signs, layout.columns, input.order);
    for (int64_t group = 0; group < layout.groups(); ++group, out += padded) {
        const int64_t first = group * layout.group_columns;
        const int64_t count = std::min(layout.group_columns, layout.columns - first);
        std::memcpy(out, plain + first, count * sizeof(float));
        std::fill(out + count, out + padded, 0.0f);
    }
}

struct LookupScratch {
    Scratch rows, tables, units, sums, output;
};

void look_up_rows(const Kernels& kernels, const Matrix& m, const Activations& input, int64_t first, int count,
                  bool fast, float* output, int threads) {
    const Layout& layout = m.layout;
    const int64_t columns = layout.padded_columns(), chunks = layout.chunks();
    const int64_t tables = columns / kLookupColumns * kTable;
    thread_local LookupScratch scratch;
    float* rows = scratch.rows.room<float>(count * columns);
    float* sums = m.offsets ? scratch.sums.room<float>(count * chunks) : nullptr;
    float* units = fast ? scratch.units.room<float>(count * chunks) : nullptr;
    float* exact = fast ? nullptr : scratch.tables.room<float>(count * tables);
    int16_t* halves = fast ? scratch.tables.room<int16_t>(count * tables) : nullptr;
    Pool::shared().run(count, threads, [&](int64_t b) {
        float* row = rows + b * columns;
        read_padded(layout, input, first + b, row);
        if (sums) kernels.sum_chunks(layout, row, sums + b * chunks);
        if (fast) kernels.build_fast(layout, row, halves + b * tables, units + b * chunks);
        else kernels.build_exact(row, columns, exact + b * tables);
    });
    const Lookups in{count, exact, halves, units, sums, output};
    const auto look_up = fast ? kernels.look_up_fast : kernels.look_up;
    Pool::shared().run(layout.stripes(), threads, [&](int64_t stripe) { look_up(m, in, stripe); });
}

// Copies one padded row to its places in a panel.
template <class T>
void scatter(const Layout& layout, const T* row, int64_t b, int64_t batch, T* panel) {
    for_each_chunk(layout, [&](int64_t, int64_t word, int words) {
        const int64_t first = word * kWordColumns, count = words * kWordColumns;
        std::memcpy(panel + first * batch + b * count, row + first, count * sizeof(T));
    });
}

void multiply_rows(const Kernels& kernels, const Matrix& m, const Activations& input, bool half, float* output,
                   int threads) {
    const Layout& layout = m.layout;
    const int64_t columns = layout.padded_columns();
    thread_local Scratch panel_scratch;
    Panel in{input.rows, nullptr, nullptr, output};
    float* values = half ? nullptr : panel_scratch.room<float>(input.rows * columns);
    uint16_t* halves = half ? panel_scratch.room<uint16_t>(input.rows * columns) : nullptr;
    in.values = values;
    in.halves = halves;
    Pool::shared().run(input.rows, threads, [&](int64_t b) {
        thread_local Scratch row_scratch, half_scratch;
        float* row = row_scratch.room<float>(columns);
        read_padded(layout, input, b, row);
        if (half) {
            uint16_t* rounded = half_scratch.room<uint16_t>(columns);
            write(row, columns, Number::kBFloat16, rounded, 0);
            scatter(layout, rounded, b, input.rows, halves);
        } else {
            scatter(layout, row, b, input.rows, values);
        }
    });
    const auto multiply = half ? kernels.multiply_half : kernels.multiply;
    Pool::shared().run(layout.blocks(), threads, [&](int64_t block) { multiply(m, in, block); });
}

#if defined(__x86_64__)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const Kernels* const* available_kernels() {
    static const Kernels* found[5] = {};
    static const bool filled = [] {
        const Kernels** next = found;
#if defined(__x86_64__)
        if (runs_avx512() && __builtin_cpu_supports("avx512bf16")) *next++ = avx512_bf16_kernels();
        if (runs_avx512()) *next++ = avx512_kernels();
        if (runs_avx2()) *next++ = avx2_kernels();
#elif defined(__aarch64__)
        *next++ = neon_kernels();
#endif
        *next = portable_kernels();
        return true;
    }();
    (void)filled;
    return found;
}

const Kernels* find_kernels(const char* name) {
    for (const Kernels* const* each = available_kernels(); *each; ++each)
        if (std::strcmp((*each)->name, name) == 0) return *each;
    return nullptr;
}

void linear(const Kernels& kernels, const Matrix& matrix, const Activations& input, void* output, bool fast,
            Method method, int threads) {
    const Layout& layout = matrix.layout;
    const int64_t bytes = layout.entries() * static_cast<int64_t>(sizeof(uint32_t));
    const int64_t useful = 1 + bytes * input.rows / kBytesPerThread;
    threads = static_cast<int>(std::min<int64_t>(threads, useful));
    const bool convert = input.type != Number::kFloat32;
    thread_local Scratch output_scratch;
    const bool look_up = method == Method::kLookUp ||
                         (method == Method::kAutomatic && input.rows <= kernels.most_lookups(layout.bits, fast));
    if (!look_up) {
        float* result = convert ? output_scratch.room<float>(input.rows * layout.rows) : static_cast<float*>(output);
        const bool half = fast && kernels.multiply_half && input.type == Number::kBFloat16;
        multiply_rows(kernels, matrix, input, half, result, threads);
        if (convert) write(result, input.rows * layout.rows, input.type, output, 0);
        return;
    }
    for (int64_t first = 0; first < input.rows; first += kTileRows) {
        const int count = static_cast<int>(std::min<int64_t>(kTileRows, input.rows - first));
        float* result = convert ? output_scratch.room<float>(count * layout.rows)
                                : static_cast<float*>(output) + first * layout.rows;
        look_up_rows(kernels, matrix, input, first, count, fast, result, threads);
        if (convert) write(result, count * layout.rows, input.type, output, first * layout.rows);
    }
}

void rotate_rows(const Activations& input, int64_t columns, void* output, int threads) {
    const int64_t useful = 1 + input.rows * columns * static_cast<int64_t>(sizeof(float)) / kBytesPerThread;
    threads = static_cast<int>(std::min<int64_t>(threads, useful));
    Pool::shared().run(input.rows, threads, [&](int64_t row) {
        thread_local Scratch row_scratch;
        float* values = row_scratch.room<float>(columns);
        read(input, row, columns, values);
        rotate(values, input.signs, columns, input.order);
        write(values, columns, input.type, output, row * columns);
    });
}

}  // namespace shiftadd
