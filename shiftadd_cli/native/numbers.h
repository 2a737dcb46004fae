// Conversions from and to the types of activations, and memory that a thread reuses between calls.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"

namespace shiftadd {

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void read_numbers(const void* values, Number type, int64_t at, int64_t count, float* out) {
    if (type == Number::kFloat32) {
        std::memcpy(out, static_cast<const float*>(values) + at, count * sizeof(float));
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(values) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = std::bit_cast<float>(static_cast<uint32_t>(from[i]) << 16);
}

inline void write_numbers(const float* values, int64_t count, Number type, void* output, int64_t at) {
    if (type == Number::kFloat32) {
        std::memcpy(static_cast<float*>(output) + at, values, count * sizeof(float));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(output) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(values[i]);
}

// The scale that a code stands for, see `scales` in layout.h.
inline float decode_scale(uint8_t code) {
    const uint32_t e = code & 15, d = (code >> 4) & 7, minus = code >> 7;
    if (e == 15) return 0.0f;
    const float first = std::bit_cast<float>((127 - e) << 23);
    return d ? first + std::bit_cast<float>((127 - e - d) << 23 | minus << 31) : first;
}

class Scratch {
public:
    // Room for `count` numbers of type T, aligned to cache lines. Its old contents may be lost.
    template <class T>
    T* room(size_t count) {
        const size_t bytes = count * sizeof(T);
        if (bytes > bytes_) {
            memory_.reset();
            bytes_ = 0;  // in case the allocation fails
            memory_.reset(::operator new(bytes, kAlignment));
            bytes_ = bytes;
        }
        return static_cast<T*>(memory_.get());
    }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t bytes_ = 0;
};

// Working memory of a stripe, see viterbi_impl.h.
struct PathScratch {
    Scratch goals, levels, decisions;
};

}  // namespace shiftadd
