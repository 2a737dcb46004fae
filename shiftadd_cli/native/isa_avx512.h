// AVX-512 (F, BW, DQ, VL): a table is one register, and a permutation by the low four bits of each lane is a look-up.
#pragma once

#include <immintrin.h>

#include "kernels_impl.h"

namespace shiftadd {
namespace {

struct Avx512 {
    static constexpr const char* kName = "avx512";
    static constexpr int kLanes = 16, kRegisters = 32;
    static constexpr int kTile = 12;  // rows of a tile: 24 registers of sums, 2 of weights, 1 of activations
    using Word = __m512i;
    using Float = __m512;
    using Half = __m512i;
    using Words32 = uint32_t __attribute__((vector_size(64)));
    using Words16 = uint16_t __attribute__((vector_size(64)));

    static int64_t most_lookups(int bits, bool fast) { return (fast ? 96 : 36) / bits; }

    static Float zero() { return _mm512_setzero_ps(); }
    static Float set(float value) { return _mm512_set1_ps(value); }
    static Float load(const float* from) { return _mm512_loadu_ps(from); }
    static Float load_bfloat16(const uint16_t* from) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static Float load_codes(const int8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    }
    static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(Float x) { return _mm512_reduce_add_ps(x); }
    // x > bound ? yes : no, per lane.
    static Float if_above(Float x, Float bound, Float yes, Float no) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), no, yes);
    }
    static Float least(Float a, Float b) { return _mm512_min_ps(a, b); }
    // Bit i: a < b in lane i.
    static uint32_t below(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
    // Lane i gets from[i / N].
    template <int N>
    static Float repeat(const float* from) {
        if constexpr (N == 2) {
            const __m512i index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(from)));
        } else if constexpr (N == 4) {
            const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(from)), index);
        } else if constexpr (N == 8) {
            return _mm512_insertf32x8(_mm512_set1_ps(from[0]), _mm256_set1_ps(from[1]), 1);
        } else {
            return _mm512_set1_ps(from[0]);
        }
    }
    // Lane i gets the value of lane i ^ H.
    template <int H>
    static Float swap(Float x) {
        if constexpr (H == 1) return _mm512_permute_ps(x, 0xb1);
        else if constexpr (H == 2) return _mm512_permute_ps(x, 0x4e);
        else if constexpr (H == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
        else return _mm512_shuffle_f32x4(x, x, 0x4e);
    }
    // Compilers otherwise load a value again for each of its uses, which then wait for the load units.
    static __m512i in_register(__m512i x) {
        asm("" : "+v"(x));
        return x;
    }
    static Word load_words(const uint32_t* from) { return in_register(_mm512_loadu_si512(from)); }
    static Word shift_right(Word x, int n) { return Word(Words32(x) >> n); }
    static Word shift_left(Word x, int n) { return Word(Words32(x) << n); }
    static Word exclusive_or(Word a, Word b) { return _mm512_xor_si512(a, b); }
    // The same with 0 in the first N halves.
    template <int N>
    static Word without(Word x) {
        return _mm512_maskz_mov_epi16(~__mmask32{0} << N, x);
    }
    static void prefetch(const char* from) { _mm_prefetch(from, _MM_HINT_T0); }

    static Float negate(Float x) { return flip(x, _mm512_set1_epi32(INT32_MIN)); }
    // Flips the sign where the highest bit of `by` is set.
    static Float flip(Float x, Word by) {
        const __m512i sign = _mm512_set1_epi32(INT32_MIN);
        // x ^ (by & sign)
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(x), by, sign, 0x78));
    }

    // 2^-e (1 ± 2^-d), each factor from a table indexed by its four bits; see `layout.h`.
    static Float decode_scales(const uint8_t* codes) {
        static constexpr auto kFactors = [] {
            struct {
                float first[16], more[16];
            } factors{};
            for (int i = 0; i < 16; ++i) {
                factors.first[i] = i < 15 ? 1.0f / (1 << i) : 0;
                factors.more[i] = (i & 7 ? 1.0f / (1 << (i & 7)) : 0) * (i & 8 ? -1 : 1);
            }
            return factors;
        }();
        const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const Float first = look_up(load(kFactors.first), code);
        return fma(first, look_up(load(kFactors.more), _mm512_srli_epi32(code, 4)), first);
    }

    static void build_table(const float* x, float* table) {
        const __m512 zero = _mm512_setzero_ps();
        __m512 sum = _mm512_mask_sub_ps(set(x[0]), 0x5555, zero, set(x[0]));
        for (int c = 1; c < kLookupColumns; ++c) {
            static constexpr __mmask16 kMinus[] = {0x5555, 0x3333, 0x0f0f, 0x00ff};
            const __m512 value = set(x[c]);
            sum = _mm512_mask_sub_ps(_mm512_add_ps(sum, value), kMinus[c], sum, value);
        }
        store(table, sum);
    }
    static Float load_table(const float* table) { return _mm512_loadu_ps(table); }
    static Float look_up(Float table, Word index) { return _mm512_permutexvar_ps(index, table); }

    static Half zero_half() { return _mm512_setzero_si512(); }
    static Half add_half(Half a, Half b) { return _mm512_add_epi16(a, b); }
    static Word shift_right_half(Word x, int n) { return Word(Words16(x) >> n); }
    // The entries of 5 columns fill a register, those of 6 two.
    static constexpr HalfTables kHalfTables{3, {5, 5, 6}};
    struct TwoRegisters {
        __m512i low, high;
    };
    template <int N>
    static auto load_half_table(const int16_t* table) {
        const __m512i first = in_register(_mm512_loadu_si512(table));
        if constexpr (N == 5) return first;
        else return TwoRegisters{first, in_register(_mm512_loadu_si512(table + 32))};
    }
    static Half look_up_half(Half table, Word index) { return _mm512_permutexvar_epi16(index, table); }
    static Half look_up_half(const TwoRegisters& table, Word index) {
        return _mm512_permutex2var_epi16(table.low, index, table.high);
    }
    static Float low_halves(Half x) {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16));
    }
    static Float high_halves(Half x) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(x, 16)); }
};

}  // namespace

}  // namespace shiftadd
