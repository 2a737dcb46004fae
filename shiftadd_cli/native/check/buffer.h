// Memory of exactly the requested size: an access outside it ends the program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace shiftadd::check {

// Bytes that end at an unreadable page, or from the address sanitizer's heap, which watches every byte around them.
void* exact_allocate(size_t bytes);
// Ends the program if the readable bytes before the buffer have changed.
void exact_free(void* memory, size_t bytes);

// `count` numbers, all bytes 0xff at first: NaN as floats, which exposes reads of unwritten numbers.
template <class T>
class Buffer {
    static_assert(std::is_trivially_copyable_v<T>);

public:
    Buffer() = default;
    explicit Buffer(int64_t count) : count_(count), memory_(static_cast<T*>(exact_allocate(count * sizeof(T)))) {
        std::memset(memory_, 0xff, count * sizeof(T));
    }
    Buffer(Buffer&& other) noexcept
        : count_(std::exchange(other.count_, 0)), memory_(std::exchange(other.memory_, nullptr)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(count_, other.count_);
        std::swap(memory_, other.memory_);
        return *this;
    }
    ~Buffer() {
        if (memory_) exact_free(memory_, count_ * sizeof(T));
    }

    T* data() { return memory_; }
    const T* data() const { return memory_; }
    int64_t size() const { return count_; }
    T& operator[](int64_t at) { return memory_[at]; }
    const T& operator[](int64_t at) const { return memory_[at]; }
    bool operator==(const Buffer& other) const {
        return count_ == other.count_ && (count_ == 0 || std::memcmp(memory_, other.memory_, count_ * sizeof(T)) == 0);
    }

private:
    int64_t count_ = 0;
    T* memory_ = nullptr;
};

}  // namespace shiftadd::check
