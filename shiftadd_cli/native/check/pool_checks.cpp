#include "pool_checks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../pool.h"
#include "block_problem.h"

namespace shiftadd::check {
namespace {

// A team like torch's: the caller and other threads, some of which start late and one never.
void threads_of_our_own(void (*work)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 2; i < threads; ++i)
        others.emplace_back([=] {
            if (i % 2) std::this_thread::sleep_for(std::chrono::microseconds(100));
            work(data);
        });
    work(data);
    for (auto& other : others) other.join();
}

}  // namespace

void check_pool(int rounds, Tally& tally) {
    describe("pool");
    const auto many_rounds = [rounds](Pool& pool, uint64_t seed) {
        Random random(seed);
        bool right = true;
        for (int round = 0; round < rounds; ++round) {
            const int64_t count = random.between(0, 9);
            std::vector<int> calls(count);
            pool.run(count, static_cast<int>(random.between(0, 5)), [&](int64_t i) { ++calls[i]; });
            right = right && std::all_of(calls.begin(), calls.end(), [](int number) { return number == 1; });
            // From time to time, a pause long enough for the workers to fall asleep.
            if (round % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
        }
        return right;
    };
    tally.expect(many_rounds(Pool::shared(), 1), "pool, one caller");
    std::atomic<bool> right{true};
    std::vector<std::thread> callers;
    for (int i = 0; i < kThreads; ++i)
        callers.emplace_back([&, i] {
            if (!many_rounds(Pool::shared(), 2 + i)) right = false;
        });
    for (auto& caller : callers) caller.join();
    tally.expect(right, "pool, several callers");
    for (int i = 0; i < 20; ++i) {
        Pool pool;
        std::atomic<int> calls{0};
        for (int round = 0; round < i; ++round) pool.run(5, 1 + i % 5, [&](int64_t) { ++calls; });
        tally.expect(calls == 5 * i, "pool that is destroyed");
    }
}

void check_exceptions(Tally& tally) {
    describe("pool, a task that throws");
    for (int threads : {1, 2, 4}) {
        std::atomic<int> inside{0};
        bool caught = false;
        try {
            Pool::shared().run(100, threads, [&](int64_t i) {
                ++inside;
                if (i == 7) throw std::runtime_error("seven");
                std::this_thread::yield();
                --inside;
            });
        } catch (const std::runtime_error&) {
            // Only the task that threw did not finish.
            caught = inside == 1;
        }
        tally.expect(caught, described());
        std::atomic<int> calls{0};
        Pool::shared().run(100, threads, [&](int64_t) { ++calls; });
        tally.expect(calls == 100, "pool after a task that threw");
    }
}

void check_together(int rounds, Tally& tally) {
    describe("together");
    Pool::use_team(threads_of_our_own);
    std::atomic<long> right{0}, wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kThreads; ++caller)
        callers.emplace_back([&, caller] {
            Random random(caller);
            for (int round = 0; round < rounds; ++round)
                Pool::shared().together(1 + (round + caller) % 5, [&] {
                    for (int64_t inner = random.between(0, 20); inner > 0; --inner) {
                        std::vector<int> calls(random.between(0, 9));
                        Pool::shared().run(static_cast<int64_t>(calls.size()), static_cast<int>(random.between(1, 4)),
                                           [&](int64_t i) { ++calls[i]; });
                        const bool once =
                            std::all_of(calls.begin(), calls.end(), [](int number) { return number == 1; });
                        ++(once ? right : wrong);
                    }
                });
        });
    for (auto& caller : callers) caller.join();
    tally.passed += right;
    if (wrong) tally.expect(false, described() + ": " + std::to_string(wrong) + " rounds were wrong");
#if !defined(__SANITIZE_THREAD__)
    bool caught = false, after = false;
    Pool::shared().together(4, [&] {
        try {
            Pool::shared().run(50, 4, [](int64_t i) {
                if (i == 7) throw std::runtime_error("seven");
            });
        } catch (const std::runtime_error&) {
            caught = true;
        }
        std::atomic<int> calls{0};
        Pool::shared().run(50, 4, [&](int64_t) { ++calls; });
        after = calls == 50;
    });
    tally.expect(caught && after, "together, a task that throws");
    caught = false;
    try {
        Pool::shared().together(4, [] { throw std::bad_alloc(); });
    } catch (const std::bad_alloc&) {
        caught = true;
    }
    tally.expect(caught, "together, a body that throws");
#endif
    Random random(5);
    for (int number = 0; number < 10; ++number) {
        const BlockProblem problem(random);
        const Numbers alone = problem.output(**available_kernels(), true, 1);
        tally.expect(problem.output(**available_kernels(), true, kThreads) == alone, "together, " + problem.name());
    }
    Pool::use_team(nullptr);
}

}  // namespace shiftadd::check
