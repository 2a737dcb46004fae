// NEON (aarch64): a table of 16 floats is four registers, and one instruction looks up bytes in all of them.
#include <arm_neon.h>

#include "kernels_impl.h"

namespace shiftadd {
namespace {

struct Neon {
    static constexpr const char* kName = "neon";
    static constexpr int kLanes = 4, kRegisters = 32;
    static constexpr int kTile = 2;  // rows of a tile: 16 registers of sums, 8 of weights, 2 of activations
    using Word = uint32x4_t;
    using Float = float32x4_t;
    using Half = int16x8_t;

    static int64_t most_lookups(int bits, bool) { return 24 / bits; }

    static Float zero() { return vdupq_n_f32(0); }
    static Float set(float value) { return vdupq_n_f32(value); }
    static Float load(const float* from) { return vld1q_f32(from); }
    static Float load_bfloat16(const uint16_t* from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16)); }
    static Float load_codes(const int8_t* from) {
        uint32_t four;
        std::memcpy(&four, from, sizeof(four));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
    }
    static void store(float* to, Float value) { vst1q_f32(to, value); }
    static Float add(Float a, Float b) { return vaddq_f32(a, b); }
    static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
    static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
    static float sum(Float x) { return vaddvq_f32(x); }
    // x > bound ? yes : no, per lane.
    static Float if_above(Float x, Float bound, Float yes, Float no) { return vbslq_f32(vcgtq_f32(x, bound), yes, no); }
    static Float least(Float a, Float b) { return vminq_f32(a, b); }
    // Bit i: a < b in lane i.
    static uint32_t below(Float a, Float b) {
        static constexpr uint32_t kBits[] = {1, 2, 4, 8};
        return vaddvq_u32(vandq_u32(vcltq_f32(a, b), vld1q_u32(kBits)));
    }
    // Lane i gets from[i / N].
    template <int N>
    static Float repeat(const float* from) {
        if constexpr (N == 2) {
            const float32x2_t two = vld1_f32(from);
            return vcombine_f32(vdup_lane_f32(two, 0), vdup_lane_f32(two, 1));
        } else {
            return vdupq_n_f32(from[0]);
        }
    }
    // Lane i gets the value of lane i ^ H.
    template <int H>
    static Float swap(Float x) {
        return H == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2);
    }
    static Word load_words(const uint32_t* from) { return vld1q_u32(from); }
    static Word shift_right(Word x, int n) { return vshlq_u32(x, vdupq_n_s32(-n)); }
    static Word shift_left(Word x, int n) { return vshlq_u32(x, vdupq_n_s32(n)); }
    static Word exclusive_or(Word a, Word b) { return veorq_u32(a, b); }
    // The same with 0 in the first N halves.
    template <int N>
    static Word without(Word x) {
        static constexpr uint16_t kPlaces[] = {0, 1, 2, 3, 4, 5, 6, 7};
        const uint16x8_t kept = vcgeq_u16(vld1q_u16(kPlaces), vdupq_n_u16(N));
        return vandq_u32(x, vreinterpretq_u32_u16(kept));
    }
    static void prefetch(const char* from) { __builtin_prefetch(from); }

    static Float negate(Float x) { return vnegq_f32(x); }
    static Float flip(Float x, Word by) {
        const Word sign = vandq_u32(by, vdupq_n_u32(0x80000000u));
        return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), sign));
    }

    static Float decode_scales(const uint8_t* codes) {
        uint32_t four;
        std::memcpy(&four, codes, sizeof(four));
        const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
        const Word code = vmovl_u16(vget_low_u16(wide));
        const Word e = vandq_u32(code, vdupq_n_u32(15));
        const Word d = vandq_u32(vshrq_n_u32(code, 4), vdupq_n_u32(7));
        const Word minus = vshlq_n_u32(vshrq_n_u32(code, 7), 31);
        const Word exponent = vsubq_u32(vdupq_n_u32(127), e);
        const Word none = vceqq_u32(e, vdupq_n_u32(15));
        const Word first = vbicq_u32(vshlq_n_u32(exponent, 23), none);
        const Word second = vorrq_u32(vshlq_n_u32(vsubq_u32(exponent, d), 23), minus);
        const Word alone = vorrq_u32(none, vceqq_u32(d, vdupq_n_u32(0)));
        return vaddq_f32(vreinterpretq_f32_u32(first), vreinterpretq_f32_u32(vbicq_u32(second, alone)));
    }

    static void build_table(const float* x, float* table) {
        for (int entry = 0; entry < kTable; ++entry) {
            float sum = entry & 1 ? x[0] : -x[0];
            for (int c = 1; c < kLookupColumns; ++c) sum += (entry >> c) & 1 ? x[c] : -x[c];
            table[entry] = sum;
        }
    }
    static uint8x16x4_t load_table(const float* table) {
        return vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
    }
    static Float look_up(const uint8x16x4_t& table, Word index) {
        // The four bytes of entry n are 4n, 4n + 1, 4n + 2, 4n + 3.
        const Word nibble = vandq_u32(index, vdupq_n_u32(15));
        const Word bytes = vaddq_u32(vmulq_n_u32(nibble, 0x04040404u), vdupq_n_u32(0x03020100u));
        return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
    }

    static Half zero_half() { return vdupq_n_s16(0); }
    static Half add_half(Half a, Half b) { return vaddq_s16(a, b); }
    static Word shift_right_half(Word x, int n) {
        return vreinterpretq_u32_u16(vshlq_u16(vreinterpretq_u16_u32(x), vdupq_n_s16(-n)));
    }
    static constexpr HalfTables kHalfTables = kTablesOf16;
    template <int>
    static uint8x16x2_t load_half_table(const int16_t* table) {
        return vld1q_u8_x2(reinterpret_cast<const uint8_t*>(table));
    }
    static Half look_up_half(const uint8x16x2_t& table, Word index) {
        const uint16x8_t nibble = vandq_u16(vreinterpretq_u16_u32(index), vdupq_n_u16(15));
        const uint16x8_t bytes = vaddq_u16(vmulq_n_u16(nibble, 0x0202), vdupq_n_u16(0x0100));
        return vreinterpretq_s16_u8(vqtbl2q_u8(table, vreinterpretq_u8_u16(bytes)));
    }
    static Float low_halves(Half x) {
        return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_s16(x), 16), 16));
    }
    static Float high_halves(Half x) { return vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_s16(x), 16)); }
};

}  // namespace

const Kernels* neon_kernels() { return Kernel<Neon>::table(); }

}  // namespace shiftadd
