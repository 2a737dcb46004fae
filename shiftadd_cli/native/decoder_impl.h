// The operations of a decoder block except its linear layers, for any instruction set; see kernels_impl.h.
#pragma once

#include <bit>
#include <limits>

#include "kernels.h"

namespace shiftadd {

template <class I>
struct DecoderKernel {
    static constexpr int kLanes = I::kLanes;
    using Float = typename I::Float;

    // e^x to two units in the last place, for loops that the compiler vectorizes: 2^n times a polynomial of the
    // remainder, from the Cephes library (expf). The result is limited to e^-87 … e^88; NaN stays NaN.
    static inline float exponential(float x) {
        x = x < -87.0f ? -87.0f : x;
        x = x > 88.0f ? 88.0f : x;
        constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: numbers added to it are rounded to integers
        const float rounded = x * 1.44269504f + kRound, n = rounded - kRound;
        const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
        float p = 1.9875691500e-4f;
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        const uint32_t power = (std::bit_cast<uint32_t>(rounded) - std::bit_cast<uint32_t>(kRound) + 127u) << 23;
        return (p * r * r + r + 1.0f) * std::bit_cast<float>(power);
    }

    static void gate(Activation activation, const float* gate, const float* up, int64_t count, float* out) {
        if (activation == Activation::kSilu) {
            for (int64_t i = 0; i < count; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
            return;
        }
        // x / 2 (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        for (int64_t i = 0; i < count; ++i) {
            const float x = gate[i], twice = 1.5957691216f * (x + 0.044715f * x * x * x);
            out[i] = x / (1.0f + exponential(-twice)) * up[i];
        }
    }

    static inline float number(const float* from) { return *from; }
    static inline float number(const uint16_t* from) {
        return std::bit_cast<float>(static_cast<uint32_t>(*from) << 16);
    }
    static inline Float load(const float* from) { return I::load(from); }
    static inline Float load(const uint16_t* from) { return I::load_bfloat16(from); }

    template <class T>
    static void attend_to(const Attention& a, const T* keys, const T* values) {
        float largest = -std::numeric_limits<float>::infinity();
        for (int64_t token = 0; token < a.tokens; ++token) {
            const T* key = keys + token * a.key_stride;
            Float sums = I::zero();
            int64_t i = 0;
            for (; i + kLanes <= a.size; i += kLanes) sums = I::fma(I::load(a.query + i), load(key + i), sums);
            float product = I::sum(sums);
            for (; i < a.size; ++i) product += a.query[i] * number(key + i);
            const float score = product * a.scale;
            a.scores[token] = score;
            // NaN is never the largest score, and propagates through its exponential.
            largest = score > largest ? score : largest;
        }
        float total = 0;
        for (int64_t token = 0; token < a.tokens; ++token) a.scores[token] = exponential(a.scores[token] - largest);
        for (int64_t token = 0; token < a.tokens; ++token) total += a.scores[token];
        for (int64_t token = 0; token < a.tokens; ++token) a.scores[token] /= total;
        int64_t i = 0;
        for (; i + kMixed * kLanes <= a.size; i += kMixed * kLanes) mix<kMixed>(a, values, i);
        for (; i + kLanes <= a.size; i += kLanes) mix<1>(a, values, i);
        for (; i < a.size; ++i) {
            float sum = 0;
            for (int64_t token = 0; token < a.tokens; ++token)
                sum += a.scores[token] * number(values + token * a.value_stride + i);
            a.output[i] = sum;
        }
    }

    // Registers of sums at a time: enough for half a head of the usual size, and never all registers.
    static constexpr int kMixed = 4;

    // Numbers `first` to `first + N * kLanes - 1` of the output.
    template <int N, class T>
    static inline void mix(const Attention& a, const T* values, int64_t first) {
        Float sums[N];
        for (Float& sum : sums) sum = I::zero();
        const T* value = values + first;
        for (int64_t token = 0; token < a.tokens; ++token, value += a.value_stride) {
            const Float share = I::set(a.scores[token]);
            for (int n = 0; n < N; ++n) sums[n] = I::fma(share, load(value + n * kLanes), sums[n]);
        }
        for (int n = 0; n < N; ++n) I::store(a.output + first + n * kLanes, sums[n]);
    }

    static void attend(const Attention& a) {
        if (a.type == Number::kFloat32)
            attend_to(a, static_cast<const float*>(a.keys), static_cast<const float*>(a.values));
        else attend_to(a, static_cast<const uint16_t*>(a.keys), static_cast<const uint16_t*>(a.values));
    }
};

}  // namespace shiftadd
