// A few threads that wait for work, so that a matrix product of 20 microseconds can use them.
//
// torch has its own OpenMP runtime, whose threads spin for milliseconds after each operation and starve a second pool
// (SmolLM2 on two cores: 51 ms per token, 26 ms on torch's own team). So the kernels use the team of that runtime if
// Python finds it (extension.py), and a pool of their own otherwise.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace shiftadd {

// GOMP_parallel of libgomp: calls `work(data)` on a team of threads, including the caller, and waits for all.
using Team = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Tasks in portions that several threads take one at a time. Taking one moves a word between cores, which takes some
// 100 nanoseconds, possibly more than a task. With a few portions per thread, the others still take over the work of a
// delayed thread.
struct Portions {
    int64_t tasks = 0, size = 1;

    Portions() = default;
    Portions(int64_t count, int threads) : tasks(count), size(std::max<int64_t>(1, count / (kPerThread * threads))) {}
    int64_t count() const { return (tasks + size - 1) / size; }
    // Runs the tasks of portion `i`.
    void run(int64_t i, const std::function<void(int64_t)>& task) const {
        for (int64_t index = i * size; index < std::min(tasks, (i + 1) * size); ++index) task(index);
    }

private:
    static constexpr int64_t kPerThread = 4;
};

// Tasks that several threads share.
struct Round {
    Portions portions;
    const std::function<void(int64_t)>* task = nullptr;
    std::atomic<int64_t> next{0};
    std::mutex failing;
    std::exception_ptr failure;

    // Runs tasks until none is left, and stores the first exception.
    void take();
    void rethrow();
};

// Consecutive rounds of tasks for threads that stay awake between them, because waking a team takes longer than a small
// layer. One thread leads, the others serve.
class Session {
public:
    explicit Session(int threads) : threads_(threads) {}
    // For the leader: calls `task(i)` for i in [0, count), returns when all are done, and throws like `Pool::run`.
    void run(int64_t count, const std::function<void(int64_t)>& task);
    // For the others: helps with rounds until the leader ends the session.
    void serve();
    void end() { ended_.store(true, std::memory_order_release); }

private:
    static constexpr int kBits = 24;
    static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

    // Runs a portion, if one is left.
    bool work();

    const int threads_;
    // Number of the round, number of its portions, and the next portion: one value, so that no thread mixes two rounds.
    std::atomic<uint64_t> state_{0};
    std::atomic<int64_t> done_{0};
    std::atomic<bool> ended_{false};
    Portions portions_;
    const std::function<void(int64_t)>* task_ = nullptr;
    std::mutex failing_;
    std::exception_ptr failure_;
};

class Pool {
public:
    static Pool& shared();

    // Makes `run` use this team from now on, or its own threads if it is null.
    static void use_team(Team team);

    // Calls `task(i)` for i in [0, count) on at most `threads` threads, including the caller's; returns when all are
    // done. A concurrent caller computes alone. If the system refuses threads, fewer do the work. If tasks throw, tasks
    // that have not started may be skipped, and the first exception is rethrown at the end.
    void run(int64_t count, int threads, const std::function<void(int64_t)>& task);

    // Calls `body` while at most `threads` threads wait for its calls of `run`; rethrows its exceptions. Without a
    // team, or within another such call, only calls `body`.
    void together(int threads, const std::function<void()>& body);

    ~Pool();

private:
    void work(size_t index);
    // Starts missing workers. Returns the number of workers, at most `count`.
    size_t grow(size_t count);

    std::mutex busy_;
    std::vector<std::thread> workers_;
    std::mutex sleep_;
    std::condition_variable wake_;
    // Number of the round, and of its helpers in the low bits: one value, so that no helper mixes two rounds.
    std::atomic<uint64_t> round_{0};
    std::atomic<size_t> running_{0};
    std::atomic<bool> stop_{false};
    Round tasks_;
};

}  // namespace shiftadd
