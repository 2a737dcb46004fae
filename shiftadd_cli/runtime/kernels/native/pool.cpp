#include "pool.h"

#include <algorithm>
#include <system_error>
#include <utility>

#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace shiftadd {
namespace {

// Looks at the flag so often before a thread goes to sleep: some 20 microseconds, about the pause between two layers.
constexpr int kSpins = 4000;
constexpr int kHelperBits = 16;
constexpr uint64_t kHelperMask = (1u << kHelperBits) - 1;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool& Pool::shared() {
    // Never destroyed: a module is unloaded after its threads could still be asked, and a forked child has none of them.
    static std::atomic<Pool*> pool{nullptr};
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool;
#if defined(__linux__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    });
    return *pool.load();
}

Pool::~Pool() {
    {
        std::lock_guard lock(sleep_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

size_t Pool::grow(size_t wanted) {
    while (workers_.size() < wanted) {
        const size_t index = workers_.size();
        try {
            workers_.emplace_back([this, index] { work(index); });
        } catch (const std::system_error&) {
            break;  // a limit of the process or its container
        }
    }
    return std::min(workers_.size(), wanted);
}

void Pool::run(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (threads <= 1 || count <= 1 || !lock.owns_lock()) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    const size_t wanted = static_cast<size_t>(threads < count ? threads : count) - 1;
    const size_t helpers = grow(wanted < kHelperMask ? wanted : kHelperMask);
    task_ = &task;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    running_.store(helpers, std::memory_order_relaxed);
    {
        // Under the lock of the sleepers: none can miss the round between its last look and its sleep.
        std::lock_guard sleepers(sleep_);
        const uint64_t number = (round_.load(std::memory_order_relaxed) >> kHelperBits) + 1;
        round_.store(number << kHelperBits | helpers, std::memory_order_release);
    }
    wake_.notify_all();
    take();
    int spins = 0;
    while (running_.load(std::memory_order_acquire) != 0) {
        if (++spins < kSpins) relax();
        else std::this_thread::yield();
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Pool::take() {
    try {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i);
    } catch (...) {
        // It may not leave a worker, nor the caller while others still use the task.
        next_.store(count_, std::memory_order_relaxed);
        std::lock_guard lock(failing_);
        if (!failure_) failure_ = std::current_exception();
    }
}

void Pool::work(size_t index) {
    uint64_t seen = 0;
    while (true) {
        for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen && !stop_; ++spins) relax();
        if (round_.load(std::memory_order_acquire) == seen) {
            std::unique_lock lock(sleep_);
            wake_.wait(lock, [&] { return stop_ || round_.load(std::memory_order_acquire) != seen; });
        }
        if (stop_) return;
        seen = round_.load(std::memory_order_acquire);
        // Threads beyond those asked for sit this round out.
        if (index >= (seen & kHelperMask)) continue;
        take();
        running_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace shiftadd
