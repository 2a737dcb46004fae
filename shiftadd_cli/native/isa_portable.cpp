// Plain C++ for any processor; the compiler vectorizes the loops as well as it can.
#include <bit>

#include "kernels_impl.h"
#include "numbers.h"

namespace shiftadd {
namespace {

struct Portable {
    static constexpr const char* kName = "portable";
    static constexpr int kLanes = 8, kRegisters = 32;
    static constexpr int kTile = 2;
    struct Word {
        uint32_t lane[kLanes];
    };
    struct Float {
        float lane[kLanes];
    };
    struct Half {
        int16_t lane[2 * kLanes];
    };

    template <class R, class F>
    static R generate(F value) {
        R result;
        for (int i = 0; i < static_cast<int>(sizeof(result.lane) / sizeof(result.lane[0])); ++i)
            result.lane[i] = value(i);
        return result;
    }

    static int64_t most_lookups(int bits, bool) { return 24 / bits; }

    static Float zero() { return set(0); }
    static Float set(float value) {
        return generate<Float>([&](int) { return value; });
    }
    static Float load(const float* from) {
        return generate<Float>([&](int i) { return from[i]; });
    }
    static Float load_bfloat16(const uint16_t* from) {
        return generate<Float>([&](int i) { return std::bit_cast<float>(static_cast<uint32_t>(from[i]) << 16); });
    }
    static Float load_codes(const int8_t* from) {
        return generate<Float>([&](int i) { return static_cast<float>(from[i]); });
    }
    static void store(float* to, const Float& value) { std::memcpy(to, value.lane, sizeof(value)); }
    static Float add(const Float& a, const Float& b) {
        return generate<Float>([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static Float mul(const Float& a, const Float& b) {
        return generate<Float>([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static Float fma(const Float& a, const Float& b, const Float& c) {
        return generate<Float>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    // x > bound ? yes : no, per lane.
    static Float if_above(const Float& x, const Float& bound, const Float& yes, const Float& no) {
        return generate<Float>([&](int i) { return x.lane[i] > bound.lane[i] ? yes.lane[i] : no.lane[i]; });
    }
    static Float least(const Float& a, const Float& b) {
        return generate<Float>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    // Bit i: a < b in lane i.
    static uint32_t below(const Float& a, const Float& b) {
        uint32_t bits = 0;
        for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a.lane[i] < b.lane[i]) << i;
        return bits;
    }
    // Lane i gets from[i / N].
    template <int N>
    static Float repeat(const float* from) {
        return generate<Float>([&](int i) { return from[i / N]; });
    }
    static float sum(Float x) {
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
        return x.lane[0];
    }
    // Lane i gets the value of lane i ^ H.
    template <int H>
    static Float swap(const Float& x) {
        return generate<Float>([&](int i) { return x.lane[i ^ H]; });
    }
    static Word load_words(const uint32_t* from) {
        Word result;
        std::memcpy(result.lane, from, sizeof(result.lane));
        return result;
    }
    static Word shift_right(const Word& x, int n) {
        return generate<Word>([&](int i) { return x.lane[i] >> n; });
    }
    static Word shift_left(const Word& x, int n) {
        return generate<Word>([&](int i) { return x.lane[i] << n; });
    }
    static Word exclusive_or(const Word& a, const Word& b) {
        return generate<Word>([&](int i) { return a.lane[i] ^ b.lane[i]; });
    }
    // The same with 0 in the first N halves.
    template <int N>
    static Word without(const Word& x) {
        return generate<Word>([&](int i) {
            const uint32_t low = 2 * i < N ? 0 : 0xffff, high = 2 * i + 1 < N ? 0 : 0xffff0000u;
            return x.lane[i] & (low | high);
        });
    }
    static void prefetch(const char* from) { __builtin_prefetch(from); }

    static Float negate(const Float& x) {
        return generate<Float>([&](int i) { return -x.lane[i]; });
    }
    static Float flip(const Float& x, const Word& by) {
        return generate<Float>([&](int i) {
            return std::bit_cast<float>(std::bit_cast<uint32_t>(x.lane[i]) ^ (by.lane[i] & 0x80000000u));
        });
    }

    static Float decode_scales(const uint8_t* codes) {
        return generate<Float>([&](int i) { return decode_scale(codes[i]); });
    }

    static void build_table(const float* x, float* table) {
        for (int entry = 0; entry < kTable; ++entry) {
            float sum = entry & 1 ? x[0] : -x[0];
            for (int c = 1; c < kLookupColumns; ++c) sum += (entry >> c) & 1 ? x[c] : -x[c];
            table[entry] = sum;
        }
    }
    static const float* load_table(const float* table) { return table; }
    static Float look_up(const float* table, const Word& index) {
        return generate<Float>([&](int i) { return table[index.lane[i] & 15]; });
    }

    static Half zero_half() {
        return generate<Half>([](int) { return int16_t{0}; });
    }
    static Half add_half(const Half& a, const Half& b) {
        return generate<Half>([&](int i) { return static_cast<int16_t>(a.lane[i] + b.lane[i]); });
    }
    // Only the low four bits of each half are used, so one shift of the whole word will do.
    static Word shift_right_half(const Word& x, int n) { return shift_right(x, n); }
    static constexpr HalfTables kHalfTables = kTablesOf16;
    template <int>
    static const int16_t* load_half_table(const int16_t* table) { return table; }
    static Half look_up_half(const int16_t* table, const Word& index) {
        return generate<Half>([&](int i) { return table[(index.lane[i / 2] >> (16 * (i % 2))) & 15]; });
    }
    static Float low_halves(const Half& x) {
        return generate<Float>([&](int i) { return static_cast<float>(x.lane[2 * i]); });
    }
    static Float high_halves(const Half& x) {
        return generate<Float>([&](int i) { return static_cast<float>(x.lane[2 * i + 1]); });
    }
};

}  // namespace

const Kernels* portable_kernels() { return Kernel<Portable>::table(); }

}  // namespace shiftadd
