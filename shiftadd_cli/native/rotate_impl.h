// The fast Walsh-Hadamard transform, with additions and one power of two, for any instruction set.
#pragma once

#include <array>
#include <cmath>

#include "kernels.h"

namespace shiftadd {

template <class I>
struct RotateKernel {
    static constexpr int kLanes = I::kLanes;
    using Float = typename I::Float;

    // One stage on `order` values, fewer than a register holds: sums and differences of values `half` apart.
    static inline void butterflies(float* values, int64_t order, int64_t half) {
        for (int64_t start = 0; start < order; start += 2 * half)
            for (int64_t i = start; i < start + half; ++i) {
                const float low = values[i], high = values[i + half];
                values[i] = low + high;
                values[i + half] = low - high;
            }
    }

    // The stage for values H apart in one register: the lower of two gets their sum, the higher their difference.
    template <int H>
    static inline Float within(Float x) {
        static constexpr auto kSigns = [] {
            std::array<float, kLanes> signs{};
            for (int i = 0; i < kLanes; ++i) signs[i] = i & H ? -1.0f : 1.0f;
            return signs;
        }();
        return I::fma(x, I::load(kSigns.data()), I::template swap<H>(x));
    }

    // All stages for values less than a register apart.
    static inline void registers(float* values, int64_t order) {
        for (int64_t i = 0; i < order; i += kLanes) {
            Float x = within<2>(within<1>(I::load(values + i)));
            if constexpr (kLanes > 4) x = within<4>(x);
            if constexpr (kLanes > 8) x = within<8>(x);
            I::store(values + i, x);
        }
    }

    static inline void butterfly(Float& low, Float& high) {
        const Float sum = I::add(low, high);
        high = I::fma(I::set(-1.0f), high, low);  // the difference, rounded once
        low = sum;
    }

    // In registers: the stages for values `half`, ... 2^(Stages - 1) `half` apart; `half` is a multiple of the lanes.
    template <int Stages>
    static inline void stages(float* values, int64_t order, int64_t half) {
        constexpr int kCount = 1 << Stages;
        for (int64_t start = 0; start < order; start += kCount * half)
            for (int64_t i = start; i < start + half; i += kLanes) {
                Float v[kCount];
                for (int j = 0; j < kCount; ++j) v[j] = I::load(values + i + j * half);
                for (int step = 1; step < kCount; step *= 2)
                    for (int j = 0; j < kCount; ++j)
                        if (!(j & step)) butterfly(v[j], v[j + step]);
                for (int j = 0; j < kCount; ++j) I::store(values + i + j * half, v[j]);
            }
    }

    static void rotate(float* row, const float* signs, int64_t columns, int64_t order) {
        for (int64_t i = 0; i < columns; ++i) row[i] *= signs[i];
        int log = 0;
        while ((int64_t{1} << (log + 1)) <= order) ++log;
        const float scale = std::ldexp(1.0f, -(log / 2));
        for (int64_t start = 0; start < columns; start += order) {
            float* block = row + start;
            if (order < kLanes) {
                for (int64_t half = 1; half < order; half *= 2) butterflies(block, order, half);
            } else {
                registers(block, order);
                int64_t half = kLanes;
                for (; 8 * half <= order; half *= 8) stages<3>(block, order, half);
                if (4 * half == order) stages<2>(block, order, half);
                if (2 * half == order) stages<1>(block, order, half);
            }
            for (int64_t i = 0; i < order; ++i) block[i] *= scale;
        }
    }
};

}  // namespace shiftadd
