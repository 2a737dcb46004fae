// Checks the kernels without Python, so that sanitizers and emulators can run them: compares every instruction set of
// this processor with the plainest formula in double precision, in buffers of exactly the right size, on one thread and
// on many.
//
// usage: check [--quick] [--seed N]
//
// One line per instruction set, then `N passed, N failed`; exits with 1 if anything failed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../pool.h"
#include "block_problem.h"
#include "parts.h"
#include "pool_checks.h"
#include "process_checks.h"
#include "products.h"
#include "solver_checks.h"

namespace shiftadd::check {
namespace {

void check_all(uint64_t seed, bool quick) {
    Tally rest;
    std::vector<Tally> tallies;
    for (const Kernels* const* set = available_kernels(); *set; ++set) tallies.emplace_back();

    const int problems = quick ? 40 : 300;
    for (int number = 0; number < problems; ++number) {
        Random random(seed + number);
        const Problem problem(random_shape(random, !quick), static_cast<Values>(number % 4), random);
        check_packing(problem, rest);
        const Expected expected = problem.expected();
        for (size_t i = 0; i < tallies.size(); ++i)
            check_products(*available_kernels()[i], problem, expected, tallies[i]);
    }
    for (int number = 0; number < problems / 4; ++number) {
        Random random(seed + number);
        BlockProblem problem(random);
        const std::vector<double> expected = problem.expected();
        for (size_t i = 0; i < tallies.size(); ++i)
            check_block(*available_kernels()[i], problem, expected, tallies[i]);
    }
    for (size_t i = 0; i < tallies.size(); ++i) {
        const Kernels& kernels = *available_kernels()[i];
        Random random(seed);
        check_tables(kernels, random, tallies[i]);
        check_attention(kernels, random, tallies[i]);
        check_codes(kernels, random, tallies[i]);
        check_rotation(kernels, random, quick, tallies[i]);
        check_moments(kernels, random, quick, tallies[i]);
        check_settle(kernels, random, tallies[i]);
        check_paths(kernels, random, quick, tallies[i]);
        check_not_finite(kernels, random, tallies[i]);
        check_concurrent_calls(kernels, random, quick ? 3 : 20, tallies[i]);
        std::printf("%-12s %ld passed, %ld failed; exact within %.2f roundings, fast within %.1e\n", kernels.name,
                    tallies[i].passed, tallies[i].failed, tallies[i].roundings, tallies[i].fast_error);
    }
    Random random(seed);
    check_pool(quick ? 1000 : 20000, rest);
    check_together(quick ? 100 : 1000, rest);
#if !defined(__SANITIZE_THREAD__)
    // The thread sanitizer watches neither child processes nor the library that passes exceptions between threads.
    check_exceptions(rest);
    check_fork(random, rest);
#endif
#if !SHIFTADD_SANITIZED && defined(__x86_64__)
    // Sanitizers need more addresses than the limit allows, and the emulator ignores it.
    check_without_threads(rest);
    check_without_memory(random, rest);
#endif
    std::printf("%-12s %ld passed, %ld failed\n", "the rest", rest.passed, rest.failed);
    for (const Tally& tally : tallies) rest.add(tally);
    std::printf("%ld passed, %ld failed\n", rest.passed, rest.failed);
    std::fflush(nullptr);
    // Exits while the workers still wait for work, as any process may.
    Pool::shared().run(8, kThreads, [](int64_t) {});
    std::exit(rest.failed ? 1 : 0);
}

}  // namespace
}  // namespace shiftadd::check

int main(int count, char** arguments) {
    using namespace shiftadd::check;
    uint64_t seed = 1;
    bool quick = false;
    for (int i = 1; i < count; ++i) {
        if (std::strcmp(arguments[i], "--quick") == 0) {
            quick = true;
        } else if (std::strcmp(arguments[i], "--seed") == 0 && i + 1 < count) {
            seed = std::strtoull(arguments[++i], nullptr, 10);
        } else {
            std::fprintf(stderr, "usage: check [--quick] [--seed N]\n");
            return 2;
        }
    }
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    watch_for_crashes();
    check_all(seed, quick);
}
