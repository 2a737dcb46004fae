#include "process_checks.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <exception>
#include <new>
#include <thread>

#include "../pool.h"
#include "products.h"

namespace shiftadd::check {
namespace {

// The result of `inside` in a child process, which has half a minute.
template <class Inside>
bool in_child(Inside inside) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        alarm(30);
        _exit(inside() ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Leaves this process memory for small allocations only.
bool limit_memory() {
    long pages = 0;
    std::FILE* sizes = std::fopen("/proc/self/statm", "r");
    if (!sizes || std::fscanf(sizes, "%ld", &pages) != 1) return false;
    std::fclose(sizes);
    const rlim_t max_bytes = static_cast<rlim_t>(pages) * sysconf(_SC_PAGESIZE) + (2 << 20);
    const rlimit limit{max_bytes, max_bytes};
    return setrlimit(RLIMIT_AS, &limit) == 0;
}

}  // namespace

void check_fork(Random& random, Tally& tally) {
    describe("fork");
    const Shape shape{300, 400, 128, 4, 4, 3, true, true, true, true, Number::kFloat32};
    const Problem problem(shape, Values::kNormal, random);
    const Kernels& kernels = **available_kernels();
    const Numbers alone = product(kernels, problem, kWays[0], 1);
    const auto same = [&] { return product(kernels, problem, kWays[0], kThreads) == alone; };
    tally.expect(same() && in_child(same) && same(), "a child of an idle parent");
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop) (void)product(kernels, problem, kWays[0], kThreads);
    });
    bool right = true;
    for (int i = 0; i < 10; ++i) right = right && in_child(same);
    stop = true;
    busy.join();
    tally.expect(right, "children of a parent whose pool is busy");
}

void check_without_threads(Tally& tally) {
    describe("no more threads");
    tally.expect(in_child([] {
        if (!limit_memory()) return false;
        std::atomic<int> calls{0};
        for (int round = 1; round <= 3; ++round) {
            try {
                // Some stacks of the parent's threads are left, but not hundreds.
                Pool::shared().run(500, 500, [&](int64_t) { ++calls; });
            } catch (const std::exception&) {
                return false;
            }
            if (calls != 500 * round) return false;
        }
        return true;
    }), described());
}

void check_without_memory(Random& random, Tally& tally) {
    describe("no more memory");
    const Shape shape{1, 400, 128, 1, 1, 5, true, false, false, false, Number::kFloat32};
    Shape large_shape = shape;
    large_shape.batch = 40000;
    const Problem small(shape, Values::kNormal, random), large(large_shape, Values::kNormal, random);
    const Kernels& kernels = **available_kernels();
    const Way way{Method::kMultiply, false};
    const Numbers alone = product(kernels, small, way, 1);
    Numbers output(shape.type, large_shape.batch);
    tally.expect(in_child([&] {
        if (!limit_memory()) return false;
        try {
            linear(kernels, large.matrix(), large.activations(), output.data(), way.fast, way.method, 1);
            return false;
        } catch (const std::bad_alloc&) {
            return product(kernels, small, way, 1) == alone;
        }
    }), described());
}

}  // namespace shiftadd::check
