// AVX-512 with BF16: products of pairs of bfloat16 numbers, twice as many per instruction as in float32. With AMX also
// products of tiles: 16 rows of activations by 32 columns, times 32 columns by 16 rows of weights.
#include "isa_avx512.h"

namespace shiftadd {
namespace {

struct Avx512Bf16 : Avx512 {
    static constexpr const char* kName = "avx512_bf16";
    using Pairs = __m512i;

    // Per lane, the first number in the low half and the second in the high half, rounded to nearest even.
    static Pairs pair(Float first, Float second) {
        const __m512i low = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(first)));
        const __m512i high = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(second)));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    static Pairs load_pairs(const uint32_t* from) { return _mm512_loadu_si512(from); }
    static void store_pairs(uint32_t* to, Pairs value) { _mm512_storeu_si512(to, value); }
    static Pairs set_pairs(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
    static Float dot(Pairs a, Pairs b, Float sum) { return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b)); }
};

// Gives the thread its tiles, all of 16 rows of 64 bytes, for as long as it lives. Afterwards the thread has the
// configuration that it had before, on which other libraries in the same thread may rely.
class Tiles {
public:
    Tiles() {
        _tile_storeconfig(&before_);
        Configuration ours{};
        ours.palette = 1;
        for (int tile = 0; tile < 8; ++tile) ours.rows[tile] = 16, ours.row_bytes[tile] = 64;
        _tile_loadconfig(&ours);
    }
    ~Tiles() {
        if (before_.palette) _tile_loadconfig(&before_);
        else _tile_release();
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

private:
    // As the processor reads it: Intel's manual of instructions, LDTILECFG.
    struct alignas(64) Configuration {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    Configuration before_;
};

using Bf16Kernel = Kernel<Avx512Bf16>;
using Bf16Moments = MomentsKernel<Avx512Bf16>;

// Weights of several chunks at a time, so that sums stay in tiles for as many columns as the L1 cache has room for.
struct Tiled {
    using Value = uint16_t;
    static constexpr int64_t kSlice = 1024;
    static constexpr int kChunks = 4, kTileRows = 16, kTileColumns = 32;
    alignas(64) float decoded[kChunkColumns * kBlockRows];
    alignas(64) uint32_t pairs[kChunks * kChunkColumns / 2 * kBlockRows];  // [columns / 2][32 rows]
    const Value* activations[kChunks];
    int widths[kChunks];  // columns of each chunk
    int chunks = 0, filled = 0;

    static const Value* values(const Panel& in) { return in.halves; }

    void add(const Value* values, int columns, int64_t batch, float* sums) {
        Bf16Kernel::round_pairs(decoded, columns, pairs + filled / 2 * kBlockRows);
        activations[chunks] = values;
        widths[chunks++] = columns;
        filled += columns;
        if (chunks == kChunks) flush(batch, sums);
    }

    void flush(int64_t batch, float* sums) {
        const Tiles tiles;
        int64_t b = 0;
        for (; b + kTileRows < batch; b += 2 * kTileRows) multiply_rows<2>(b, sums + b * kBlockRows);
        if (b < batch) multiply_rows<1>(b, sums + b * kBlockRows);
        chunks = filled = 0;
    }

    // Sums of 16 N rows of activations from `b`: in tiles 0 and 1, and for N = 2 also in 2 and 3.
    template <int N>
    void multiply_rows(int64_t b, float* sums) const {
        constexpr int64_t kStride = kBlockRows * sizeof(float);
        float* next = sums + kTileRows * kBlockRows;
        _tile_loadd(0, sums, kStride);
        _tile_loadd(1, sums + kTileRows, kStride);
        if constexpr (N == 2) {
            _tile_loadd(2, next, kStride);
            _tile_loadd(3, next + kTileRows, kStride);
        }
        for_each_step(b, [&](const Value* x, int64_t stride, const uint32_t* w) {
            _tile_loadd(4, x, stride);
            _tile_loadd(6, w, kStride);
            _tile_loadd(7, w + kTileRows, kStride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (N == 2) {
                _tile_loadd(5, reinterpret_cast<const char*>(x) + kTileRows * stride, stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        });
        _tile_stored(0, sums, kStride);
        _tile_stored(1, sums + kTileRows, kStride);
        if constexpr (N == 2) {
            _tile_stored(2, next, kStride);
            _tile_stored(3, next + kTileRows, kStride);
        }
    }

    // Calls `step(activations, bytes from row to row, weights)` for every 32 columns.
    template <class Step>
    void for_each_step(int64_t b, Step step) const {
        const uint32_t* w = pairs;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const int64_t stride = widths[chunk] * static_cast<int64_t>(sizeof(Value));
            const Value* x = activations[chunk] + b * widths[chunk];
            for (int column = 0; column < widths[chunk]; column += kTileColumns, w += kTileColumns / 2 * kBlockRows)
                step(x + column, stride, w);
        }
    }
};

int64_t most_lookups_beside_tiles(int planes, bool fast) {
    return fast ? 60 / planes : Avx512Bf16::most_lookups(planes, fast);
}

// A tile needs 32 columns of a chunk, which groups of an odd number of words do not have.
void multiply_tiled(const Matrix& m, const Panel& in, int64_t block) {
    if (m.layout.group_words() % 2) Bf16Kernel::multiply<Bf16Kernel::Paired>(m, in, block);
    else Bf16Kernel::multiply<Tiled>(m, in, block);
}

}  // namespace

// Everything else is the same as with AVX-512 alone, and not compiled a second time.
const Kernels* avx512_bf16_kernels() {
    static const Kernels kernels = [] {
        Kernels result = *avx512_kernels();
        result.name = Avx512Bf16::kName;
        result.multiply_half = Bf16Kernel::multiply<Bf16Kernel::Paired>;
        result.moments_half = Bf16Moments::form<Bf16Moments::Paired>();
        return result;
    }();
    return &kernels;
}

const Kernels* amx_kernels() {
    static const Kernels kernels = [] {
        Kernels result = *avx512_bf16_kernels();
        result.name = "amx";
        result.most_lookups = most_lookups_beside_tiles;
        result.multiply_half = multiply_tiled;
        return result;
    }();
    return &kernels;
}

}  // namespace shiftadd
