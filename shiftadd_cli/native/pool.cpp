#include "pool.h"

#include <algorithm>
#include <system_error>
#include <utility>

#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace shiftadd {
namespace {

// Checks of the flag before a thread goes to sleep: some 20 microseconds, about the pause between two layers.
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

std::atomic<Team> team{nullptr};

// The session that this thread leads.
thread_local Session* leading = nullptr;

// Waits between two checks: for a moment, or, after many checks, by yielding the processor.
inline void wait(int& spins) {
    if (++spins < kSpins) relax();
    else std::this_thread::yield();
}

}  // namespace

bool Session::work() {
    uint64_t state = state_.load(std::memory_order_acquire);
    do {
        if ((state & kMask) >= (state >> kBits & kMask)) return false;
    } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire));
    // The round cannot end before this portion is done.
    try {
        portions_.run(static_cast<int64_t>(state & kMask), *task_);
    } catch (...) {
        std::lock_guard lock(failing_);
        if (!failure_) failure_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
}

void Session::run(int64_t count, const std::function<void(int64_t)>& task) {
    portions_ = Portions(count, threads_);
    const int64_t portions = portions_.count();
    if (portions > static_cast<int64_t>(kMask)) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    task_ = &task;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t number = (state_.load(std::memory_order_relaxed) >> 2 * kBits) + 1;
    state_.store(number << 2 * kBits | static_cast<uint64_t>(portions) << kBits, std::memory_order_release);
    while (work()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < portions;) wait(spins);
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Session::serve() {
    for (int spins = 0; !ended_.load(std::memory_order_acquire);) {
        if (work()) spins = 0;
        else wait(spins);
    }
}

void Round::take() {
    try {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < portions.count();) portions.run(i, *task);
    } catch (...) {
        // An exception must not leave a worker, nor the caller while others still use the task.
        next.store(portions.count(), std::memory_order_relaxed);
        std::lock_guard lock(failing);
        if (!failure) failure = std::current_exception();
    }
}

void Round::rethrow() {
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

void Pool::use_team(Team new_team) { team = new_team; }

Pool& Pool::shared() {
    // Never destroyed: its threads may still be needed when the module is unloaded, and a forked child has no threads.
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

size_t Pool::grow(size_t count) {
    while (workers_.size() < count) {
        const size_t index = workers_.size();
        try {
            workers_.emplace_back([this, index] { work(index); });
        } catch (const std::system_error&) {
            break;  // a limit of the process or its container
        }
    }
    return std::min(workers_.size(), count);
}

void Pool::together(int threads, const std::function<void()>& body) {
    const Team current_team = team;
    if (!current_team || threads <= 1 || leading) return body();
    struct Call {
        const std::function<void()>& body;
        std::thread::id leader;
        Session session;
        std::exception_ptr failure;
    } call{body, std::this_thread::get_id(), Session(threads), nullptr};
    current_team(
        [](void* data) {
            Call& call = *static_cast<Call*>(data);
            if (std::this_thread::get_id() != call.leader) return call.session.serve();
            leading = &call.session;
            try {
                call.body();
            } catch (...) {
                call.failure = std::current_exception();
            }
            leading = nullptr;
            call.session.end();
        },
        &call, static_cast<unsigned>(threads), 0);
    if (call.failure) std::rethrow_exception(call.failure);
}

void Pool::run(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    const int64_t max_threads = std::min<int64_t>(threads, count);
    if (leading && max_threads > 1) return leading->run(count, task);
    if (const Team current_team = team; current_team && max_threads > 1) {
        Round round;
        round.portions = Portions(count, static_cast<int>(max_threads));
        round.task = &task;
        current_team([](void* data) { static_cast<Round*>(data)->take(); }, &round,
                     static_cast<unsigned>(max_threads), 0);
        round.rethrow();
        return;
    }
    std::unique_lock lock(busy_, std::try_to_lock);
    if (max_threads <= 1 || !lock.owns_lock()) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    const size_t max_helpers = static_cast<size_t>(max_threads) - 1;
    const size_t helpers = grow(max_helpers < kHelperMask ? max_helpers : kHelperMask);
    tasks_.task = &task;
    tasks_.portions = Portions(count, static_cast<int>(helpers) + 1);
    tasks_.next.store(0, std::memory_order_relaxed);
    running_.store(helpers, std::memory_order_relaxed);
    {
        // Under the lock of the sleepers, so that none misses the round between its last check and its sleep.
        std::lock_guard sleepers(sleep_);
        const uint64_t number = (round_.load(std::memory_order_relaxed) >> kHelperBits) + 1;
        round_.store(number << kHelperBits | helpers, std::memory_order_release);
    }
    wake_.notify_all();
    tasks_.take();
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0;) wait(spins);
    tasks_.rethrow();
}

void Pool::work(size_t index) {
    uint64_t seen = 0;
    while (true) {
        for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen && !stop_; ++spins)
            relax();
        if (round_.load(std::memory_order_acquire) == seen) {
            std::unique_lock lock(sleep_);
            wake_.wait(lock, [&] { return stop_ || round_.load(std::memory_order_acquire) != seen; });
        }
        if (stop_) return;
        seen = round_.load(std::memory_order_acquire);
        // Surplus threads skip this round.
        if (index >= (seen & kHelperMask)) continue;
        tasks_.take();
        running_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace shiftadd
