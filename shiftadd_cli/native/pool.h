// A few threads that wait for work, so that a matrix product of 20 microseconds can use them.
//
// torch brings an OpenMP runtime of its own, whose threads spin for milliseconds after each of its operations; a second
// pool beside it starves (SmolLM2 on two cores: 51 ms a token, 26 on torch's own team). So the team of that runtime is
// used where Python has found it (extension.py), and a pool of our own elsewhere.
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

// GOMP_parallel of libgomp: calls `work(data)` on a team of threads, the caller among them, and waits for all.
using Team = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Tasks in portions that several threads take one after the other. To take one is a word that travels from core to
// core, some 100 nanoseconds, which a task alone may not be worth; a few portions for each thread still leave what one
// that is held up does not get to to the others.
struct Portions {
    int64_t tasks = 0, size = 1;

    Portions() = default;
    Portions(int64_t count, int threads) : tasks(count), size(std::max<int64_t>(1, count / (kEach * threads))) {}
    int64_t count() const { return (tasks + size - 1) / size; }
    // Does the tasks of portion `i`.
    void run(int64_t i, const std::function<void(int64_t)>& task) const {
        for (int64_t each = i * size; each < std::min(tasks, (i + 1) * size); ++each) task(each);
    }

private:
    static constexpr int64_t kEach = 4;
};

// Tasks that several threads take.
struct Round {
    Portions portions;
    const std::function<void(int64_t)>* task = nullptr;
    std::atomic<int64_t> next{0};
    std::mutex failing;
    std::exception_ptr failure;

    // Does tasks until none is left; what they throw is kept.
    void take();
    void rethrow();
};

// Rounds of tasks one after the other, for threads that stay between them: to wake a team takes longer than a small
// layer. One thread leads, the others serve.
class Session {
public:
    explicit Session(int threads) : threads_(threads) {}
    // The leader's: calls `task(i)` for i in [0, count); returns when all are done, and throws as `Pool::run`.
    void run(int64_t count, const std::function<void(int64_t)>& task);
    // The others': helps with rounds until the leader ends the session.
    void serve();
    void end() { ended_.store(true, std::memory_order_release); }

private:
    static constexpr int kBits = 24;
    static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

    // Does a portion, if one is left.
    bool work();

    const int threads_;
    // Number of the round, its portions, and the next of them: one value, so that no thread mixes two rounds.
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

    // From now on `run` has its tasks done by this team, if it is not null.
    static void use_team(Team team);

    // Calls `task(i)` for i in [0, count) on at most `threads` threads, the caller's included; returns when all are
    // done. A second caller at the same time computes alone. Threads that the system refuses are done without. If tasks
    // throw, tasks that nobody has begun may be left out, and the first exception is thrown again at the end.
    void run(int64_t count, int threads, const std::function<void(int64_t)>& task);

    // Calls `body`, whose calls of `run` find at most so many threads waiting for them; throws what it throws. Without a
    // team, or within another such call, `body` is called and that is all.
    void together(int threads, const std::function<void()>& body);

    ~Pool();

private:
    void work(size_t index);
    // Returns how many workers there are, `wanted` at most.
    size_t grow(size_t wanted);

    std::mutex busy_;
    std::vector<std::thread> workers_;
    std::mutex sleep_;
    std::condition_variable wake_;
    // Number of the round, and in the low bits how many helpers it wants: one value, so that no helper mixes two rounds.
    std::atomic<uint64_t> round_{0};
    std::atomic<size_t> running_{0};
    std::atomic<bool> stop_{false};
    Round tasks_;
};

}  // namespace shiftadd
