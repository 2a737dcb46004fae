// AVX-512 with BF16: products of pairs of bfloat16 numbers, twice as many per instruction as in float32.
#include "isa_avx512.h"

namespace shiftadd {
namespace {

struct Avx512Bf16 : Avx512 {
    static constexpr const char* kName = "avx512_bf16";
    static constexpr bool kHasPairs = true;
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

}  // namespace

const Kernels* avx512_bf16_kernels() { return Kernel<Avx512Bf16>::table(); }

}  // namespace shiftadd
