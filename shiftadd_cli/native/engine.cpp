#include "engine.h"

#include <algorithm>
#include <cstring>

#include "lookups.h"
#include "pool.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace shiftadd {
namespace {

FillRow rows_of(const Activations& input, int64_t columns, int64_t first) {
    return [=](int64_t row, float* out) {
        read_numbers(input.values, input.type, (first + row) * columns, columns, out);
    };
}

void look_up_rows(const Kernels& kernels, const Matrix& m, const Activations& input, int64_t first, int count,
                  bool fast, float* output, int threads) {
    thread_local LookupScratch scratch;
    Lookups in = build_lookups(kernels, m.layout, input.rotation, rows_of(input, m.layout.columns, first), count, fast,
                               m.offsets != nullptr, threads, scratch);
    in.output = output;
    const auto look_up = fast ? kernels.look_up_fast : kernels.look_up;
    Pool::shared().run(m.layout.stripes(), threads, [&](int64_t stripe) { look_up(m, in, stripe); });
}

// Copies the chunks of one padded row to a panel.
template <class T>
void scatter(const Layout& layout, const T* row, int64_t b, int64_t batch, T* panel) {
    for_each_chunk(layout, [&](int64_t, int64_t word, int words) {
        const int64_t first = word * kWordColumns, count = words * kWordColumns;
        std::memcpy(panel + first * batch + b * count, row + first, count * sizeof(T));
    });
}

// `output` is bfloat16 if `half`, otherwise float32.
void multiply_rows(const Kernels& kernels, const Matrix& m, const Activations& input, bool half, void* output,
                   int threads) {
    const Layout& layout = m.layout;
    const int64_t columns = layout.padded_columns();
    thread_local Scratch panel_scratch;
    float* values = half ? nullptr : panel_scratch.room<float>(input.rows * columns);
    uint16_t* halves = half ? panel_scratch.room<uint16_t>(input.rows * columns + kPanelMargin) : nullptr;
    const FillRow fill = rows_of(input, layout.columns, 0);
    Pool::shared().run(input.rows, threads, [&](int64_t b) {
        thread_local Scratch row_scratch, half_scratch;
        float* row = row_scratch.room<float>(columns);
        fill_padded(kernels, layout, input.rotation, fill, b, row);
        if (half) {
            uint16_t* rounded = half_scratch.room<uint16_t>(columns);
            write_numbers(row, columns, Number::kBFloat16, rounded, 0);
            scatter(layout, rounded, b, input.rows, halves);
        } else {
            scatter(layout, row, b, input.rows, values);
        }
    });
    const Panel in{input.rows, values, half ? nullptr : static_cast<float*>(output), halves,
                   half ? static_cast<uint16_t*>(output) : nullptr};
    const auto multiply = half ? kernels.multiply_half : kernels.multiply;
    Pool::shared().run(layout.blocks(), threads, [&](int64_t block) { multiply(m, in, block); });
}

#if defined(__x86_64__)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The bits of CPUID are those of Intel's manual; not every compiler has names for them. Linux lets a process use tiles
// when it asks for them: its documentation, arch/x86/xstate.rst.
bool runs_amx() {
#if defined(__linux__)
    constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned eax, ebx, ecx, edx;
    return runs_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBfloat16) &&
           (edx & kTiles) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

const Kernels* const* available_kernels() {
    static const Kernels* sets[6] = {};
    static const bool filled = [] {
        const Kernels** next = sets;
#if defined(__x86_64__)
        if (runs_amx()) *next++ = amx_kernels();
        if (runs_avx512_bf16()) *next++ = avx512_bf16_kernels();
        if (runs_avx512()) *next++ = avx512_kernels();
        if (runs_avx2()) *next++ = avx2_kernels();
#elif defined(__aarch64__)
        *next++ = neon_kernels();
#endif
        *next = portable_kernels();
        return true;
    }();
    (void)filled;
    return sets;
}

const Kernels* find_kernels(const char* name) {
    for (const Kernels* const* kernels = available_kernels(); *kernels; ++kernels)
        if (std::strcmp((*kernels)->name, name) == 0) return *kernels;
    return nullptr;
}

void linear(const Kernels& kernels, const Matrix& matrix, const Activations& input, void* output, bool fast,
            Method method, int threads) {
    const Layout& layout = matrix.layout;
    threads = useful_threads(threads, layout.bytes() * input.rows);
    const bool convert = input.type != Number::kFloat32;
    thread_local Scratch output_scratch;
    const bool look_up = method == Method::kLookUp ||
                         (method == Method::kAutomatic && input.rows <= kernels.most_lookups(layout.planes, fast));
    if (!look_up) {
        const bool half = fast && kernels.multiply_half && input.type == Number::kBFloat16;
        if (half || !convert) return multiply_rows(kernels, matrix, input, half, output, threads);
        float* result = output_scratch.room<float>(input.rows * layout.rows);
        multiply_rows(kernels, matrix, input, false, result, threads);
        write_numbers(result, input.rows * layout.rows, input.type, output, 0);
        return;
    }
    for (int64_t first = 0; first < input.rows; first += kTileRows) {
        const int count = static_cast<int>(std::min<int64_t>(kTileRows, input.rows - first));
        float* result = convert ? output_scratch.room<float>(count * layout.rows)
                                : static_cast<float*>(output) + first * layout.rows;
        look_up_rows(kernels, matrix, input, first, count, fast, result, threads);
        if (convert) write_numbers(result, count * layout.rows, input.type, output, first * layout.rows);
    }
}

void rotate_rows(const Kernels& kernels, const Activations& input, int64_t columns, void* output, int threads) {
    threads = useful_threads(threads, input.rows * columns * static_cast<int64_t>(sizeof(float)));
    Pool::shared().run(input.rows, threads, [&](int64_t row) {
        thread_local Scratch row_scratch;
        float* values = row_scratch.room<float>(columns);
        read_numbers(input.values, input.type, row * columns, columns, values);
        kernels.rotate(values, input.rotation.signs, columns, input.rotation.order);
        write_numbers(values, columns, input.type, output, row * columns);
    });
}

}  // namespace shiftadd
