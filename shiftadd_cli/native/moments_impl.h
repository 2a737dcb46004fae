// Sums over tokens of products of two columns, for any instruction set.
//
// Columns are packed token by token, so that their products are summed in registers: in tiles of kRows columns on the
// left, in panels of kWidth columns on the right. The last tile and the last panel are padded with zeros.
//
//     left    [tile][token][kRows]      float32
//     right   [panel][token][kWidth]    float32
//
// If the processor multiplies pairs of bfloat16 numbers, a packed value holds two tokens, the earlier in its low half.
// All fast matrix products are packed like this (Goto and van de Geijn, ACM TOMS 34(3), 2008).
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "numbers.h"

namespace shiftadd {

template <class I>
struct MomentsKernel {
    static constexpr int kLanes = I::kLanes, kParts = 2;
    static constexpr int kRows = I::kRegisters >= 32 ? 12 : 6, kWidth = kParts * kLanes;
    using Float = typename I::Float;

    struct Plain {
        using Value = float;
        static constexpr int kTokens = 1;  // per step

        static Float load(const float* from) { return I::load(from); }
        static Float add_product(float left, Float right, Float sum) { return I::fma(I::set(left), right, sum); }

        template <int N>
        static void pack(const Tokens& x, int64_t column, float* out) {
            const int64_t count = std::min<int64_t>(N, x.columns - column);
            for (int64_t token = x.first; token < x.first + x.count; ++token, out += N) {
                if (count == N) {
                    read_numbers(x.values, x.type, token * x.columns + column, N, out);
                } else {
                    std::memset(out, 0, N * sizeof(float));
                    read_numbers(x.values, x.type, token * x.columns + column, count, out);
                }
                if (x.roots)
                    for (int i = 0; i < N; ++i) out[i] *= x.roots[token];
            }
        }
    };

    struct Paired {
        using Value = uint32_t;
        static constexpr int kTokens = 2;

        static auto load(const uint32_t* from) { return I::load_pairs(from); }
        template <class Pairs>
        static Float add_product(uint32_t left, Pairs right, Float sum) {
            return I::dot(I::set_pairs(left), right, sum);
        }

        template <int N>
        static void pack(const Tokens& x, int64_t column, uint32_t* out) {
            const int64_t count = std::min<int64_t>(N, x.columns - column), last = x.first + x.count;
            for (int64_t token = x.first; token < last; token += 2, out += N) {
                uint16_t low[N] = {}, high[N] = {};
                const uint16_t* from = static_cast<const uint16_t*>(x.values) + token * x.columns + column;
                const size_t bytes = count * sizeof(uint16_t);
                if (count == N) std::memcpy(low, from, sizeof(low));
                else std::memcpy(low, from, bytes);
                if (token + 1 < last) {
                    if (count == N) std::memcpy(high, from + x.columns, sizeof(high));
                    else std::memcpy(high, from + x.columns, bytes);
                }
                for (int i = 0; i < N; ++i)
                    out[i] = static_cast<uint32_t>(low[i]) | static_cast<uint32_t>(high[i]) << 16;
            }
        }
    };

    // sums[kRows][kWidth] += left' · right, over `steps` steps.
    template <class Form>
    static inline void add_steps(const typename Form::Value* left, const typename Form::Value* right, int64_t steps,
                                 float* sums, int64_t stride) {
        Float total[kRows][kParts];
        for (int row = 0; row < kRows; ++row)
            for (int part = 0; part < kParts; ++part) total[row][part] = I::load(sums + row * stride + part * kLanes);
        for (int64_t step = 0; step < steps; ++step, left += kRows, right += kWidth) {
            decltype(Form::load(right)) columns[kParts];
            for (int part = 0; part < kParts; ++part) columns[part] = Form::load(right + part * kLanes);
            for (int row = 0; row < kRows; ++row)
                for (int part = 0; part < kParts; ++part)
                    total[row][part] = Form::add_product(left[row], columns[part], total[row][part]);
        }
        for (int row = 0; row < kRows; ++row)
            for (int part = 0; part < kParts; ++part) I::store(sums + row * stride + part * kLanes, total[row][part]);
    }

    template <class Form>
    static void add(const void* left, const void* right, int64_t tokens, float* sums, int64_t stride, int rows,
                    int columns) {
        using Value = typename Form::Value;
        const int64_t steps = (tokens + Form::kTokens - 1) / Form::kTokens;
        const Value *tile = static_cast<const Value*>(left), *panel = static_cast<const Value*>(right);
        if (rows == kRows && columns == kWidth) return add_steps<Form>(tile, panel, steps, sums, stride);
        float edge[kRows * kWidth] = {};
        for (int row = 0; row < rows; ++row)
            std::memcpy(edge + row * kWidth, sums + row * stride, columns * sizeof(float));
        add_steps<Form>(tile, panel, steps, edge, kWidth);
        for (int row = 0; row < rows; ++row)
            std::memcpy(sums + row * stride, edge + row * kWidth, columns * sizeof(float));
    }

    template <class Form>
    static void pack_left(const Tokens& x, int64_t tile, void* out) {
        Form::template pack<kRows>(x, tile * kRows, static_cast<typename Form::Value*>(out));
    }

    template <class Form>
    static void pack_right(const Tokens& x, int64_t panel, void* out) {
        Form::template pack<kWidth>(x, panel * kWidth, static_cast<typename Form::Value*>(out));
    }

    template <class Form>
    static constexpr MomentKernels form() {
        return {kRows, kWidth, Form::kTokens, pack_left<Form>, pack_right<Form>, add<Form>};
    }
};

}  // namespace shiftadd
