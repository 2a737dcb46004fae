// A few threads that wait for work, so that a matrix product of 20 microseconds can use them.
//
// torch brings an OpenMP runtime of its own under a name of its own; an extension that links the system's would run a
// second pool beside it, and two OpenMP pools that spin for work starve each other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace shiftadd {

class Pool {
public:
    static Pool& shared();

    // Calls `task(i)` for i in [0, count) on at most `threads` threads, the caller's included; returns when all are
    // done. A second caller at the same time computes alone. Threads that the system refuses are done without. If tasks
    // throw, tasks that nobody has begun may be left out, and the first exception is thrown again at the end.
    void run(int64_t count, int threads, const std::function<void(int64_t)>& task);

    ~Pool();

private:
    void work(size_t index);
    void take();
    // Returns how many workers there are, `wanted` at most.
    size_t grow(size_t wanted);

    std::mutex busy_;
    std::vector<std::thread> workers_;
    std::mutex sleep_;
    std::condition_variable wake_;
    // Number of the round, and in the low bits how many helpers it wants: one value, so that no helper mixes two rounds.
    std::atomic<uint64_t> round_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<size_t> running_{0};
    std::atomic<bool> stop_{false};
    int64_t count_ = 0;
    const std::function<void(int64_t)>* task_ = nullptr;
    std::mutex failing_;
    std::exception_ptr failure_;
};

}  // namespace shiftadd
