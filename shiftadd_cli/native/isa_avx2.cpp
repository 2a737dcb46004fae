// AVX2 with FMA: a table of 16 is two registers of eight; a look-up reads both and selects by the fourth bit.
#include <immintrin.h>

#include "kernels_impl.h"

namespace shiftadd {
namespace {

struct Avx2 {
    static constexpr const char* kName = "avx2";
    static constexpr int kLanes = 8, kRegisters = 16;
    static constexpr int kTile = 2;  // rows of a tile: 8 registers of sums, 4 of weights, 2 of activations
    using Word = __m256i;
    using Float = __m256;
    using Half = __m256i;
    using Words32 = uint32_t __attribute__((vector_size(32)));
    using Words16 = uint16_t __attribute__((vector_size(32)));
    struct Table {
        Float low, high;
    };
    // Low and high bytes of the entries, each stored twice.
    struct HalfTable {
        __m256i low, high;
    };

    static int64_t most_lookups(int bits, bool) { return 24 / bits; }

    static Float zero() { return _mm256_setzero_ps(); }
    static Float set(float value) { return _mm256_set1_ps(value); }
    static Float load(const float* from) { return _mm256_loadu_ps(from); }
    static Float load_bfloat16(const uint16_t* from) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    static Float load_codes(const int8_t* from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
    static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    // x > bound ? yes : no, per lane.
    static Float if_above(Float x, Float bound, Float yes, Float no) {
        return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, bound, _CMP_GT_OQ));
    }
    static Float least(Float a, Float b) { return _mm256_min_ps(a, b); }
    // Bit i: a < b in lane i.
    static uint32_t below(Float a, Float b) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
    }
    // Lane i gets from[i / N].
    template <int N>
    static Float repeat(const float* from) {
        if constexpr (N == 2) {
            const __m128 four = _mm_loadu_ps(from);
            return _mm256_set_m128(_mm_unpackhi_ps(four, four), _mm_unpacklo_ps(four, four));
        } else if constexpr (N == 4) {
            return _mm256_set_m128(_mm_set1_ps(from[1]), _mm_set1_ps(from[0]));
        } else {
            return _mm256_set1_ps(from[0]);
        }
    }
    static float sum(Float x) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    // Lane i gets the value of lane i ^ H.
    template <int H>
    static Float swap(Float x) {
        if constexpr (H == 1) return _mm256_permute_ps(x, 0xb1);
        else if constexpr (H == 2) return _mm256_permute_ps(x, 0x4e);
        else return _mm256_permute2f128_ps(x, x, 1);
    }
    static Word load_words(const uint32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static Word shift_right(Word x, int n) { return Word(Words32(x) >> n); }
    static Word shift_left(Word x, int n) { return Word(Words32(x) << n); }
    static Word exclusive_or(Word a, Word b) { return _mm256_xor_si256(a, b); }
    // The same with 0 in the first N halves.
    template <int N>
    static Word without(Word x) {
        const __m256i place = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm256_and_si256(x, _mm256_cmpgt_epi16(place, _mm256_set1_epi16(N - 1)));
    }
    static void prefetch(const char* from) { _mm_prefetch(from, _MM_HINT_T0); }

    static Float negate(Float x) { return flip(x, _mm256_set1_epi32(INT32_MIN)); }
    static Float flip(Float x, Word by) {
        return _mm256_xor_ps(x, _mm256_castsi256_ps(_mm256_and_si256(by, _mm256_set1_epi32(INT32_MIN))));
    }

    static Float decode_scales(const uint8_t* codes) {
        const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
        const __m256i e = _mm256_and_si256(code, _mm256_set1_epi32(15));
        const __m256i d = _mm256_and_si256(_mm256_srli_epi32(code, 4), _mm256_set1_epi32(7));
        const __m256i minus = _mm256_slli_epi32(_mm256_srli_epi32(code, 7), 31);
        const __m256i exponent = _mm256_sub_epi32(_mm256_set1_epi32(127), e);
        const __m256i none = _mm256_cmpeq_epi32(e, _mm256_set1_epi32(15));
        const __m256i first = _mm256_andnot_si256(none, _mm256_slli_epi32(exponent, 23));
        const __m256i second = _mm256_or_si256(_mm256_slli_epi32(_mm256_sub_epi32(exponent, d), 23), minus);
        const __m256i alone = _mm256_or_si256(none, _mm256_cmpeq_epi32(d, _mm256_setzero_si256()));
        return _mm256_add_ps(_mm256_castsi256_ps(first), _mm256_castsi256_ps(_mm256_andnot_si256(alone, second)));
    }

    static void build_table(const float* x, float* table) {
        const __m256 minus1 = _mm256_castsi256_ps(_mm256_setr_epi32(1, 0, 1, 0, 1, 0, 1, 0));
        const __m256 minus2 = _mm256_castsi256_ps(_mm256_setr_epi32(1, 1, 0, 0, 1, 1, 0, 0));
        const __m256 minus4 = _mm256_castsi256_ps(_mm256_setr_epi32(1, 1, 1, 1, 0, 0, 0, 0));
        const auto signed_by = [](float value, __m256 minus) {
            return flip(set(value), _mm256_slli_epi32(_mm256_castps_si256(minus), 31));
        };
        // With this order of additions, all instruction sets give the same bits.
        const Float three = add(add(signed_by(x[0], minus1), signed_by(x[1], minus2)), signed_by(x[2], minus4));
        store(table, _mm256_sub_ps(three, set(x[3])));
        store(table + 8, add(three, set(x[3])));
    }
    static Table load_table(const float* table) { return {load(table), load(table + 8)}; }
    static Float look_up(const Table& table, Word index) {
        const Float low = _mm256_permutevar8x32_ps(table.low, index);
        const Float high = _mm256_permutevar8x32_ps(table.high, index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }

    static Half zero_half() { return _mm256_setzero_si256(); }
    static Half add_half(Half a, Half b) { return _mm256_add_epi16(a, b); }
    static Word shift_right_half(Word x, int n) { return Word(Words16(x) >> n); }
    static constexpr HalfTables kHalfTables = kTablesOf16;
    template <int>
    static HalfTable load_half_table(const int16_t* table) {
        const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
        const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 8));
        const __m128i bytes = _mm_set1_epi16(255);
        const __m128i low = _mm_packus_epi16(_mm_and_si128(first, bytes), _mm_and_si128(second, bytes));
        const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
    }
    // A byte index with its highest bit set gives 0: each shuffle fills one byte of an entry and clears the other.
    static Half look_up_half(const HalfTable& table, Word index) {
        const __m256i nibble = _mm256_and_si256(index, _mm256_set1_epi16(15));
        const __m256i low = _mm256_or_si256(nibble, _mm256_set1_epi16(INT16_MIN));
        const __m256i high = _mm256_or_si256(_mm256_slli_epi16(nibble, 8), _mm256_set1_epi16(0x80));
        return _mm256_or_si256(_mm256_shuffle_epi8(table.low, low), _mm256_shuffle_epi8(table.high, high));
    }
    static Float low_halves(Half x) {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 16), 16));
    }
    static Float high_halves(Half x) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(x, 16)); }
};

}  // namespace

const Kernels* avx2_kernels() { return Kernel<Avx2>::table(); }

}  // namespace shiftadd
