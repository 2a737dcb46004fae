#include "tally.h"

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>

#if SHIFTADD_SANITIZED
#include <sanitizer/common_interface_defs.h>
#endif

namespace shiftadd::check {
namespace {

// An array, because a signal handler must not allocate.
char current[400] = "start";

void print_current() {
    static constexpr char kIntro[] = "It happened in: ";
    (void)!write(2, kIntro, sizeof(kIntro) - 1);
    (void)!write(2, current, std::strlen(current));
    (void)!write(2, "\n", 1);
}

}  // namespace

void describe(const std::string& name) { std::snprintf(current, sizeof(current), "%s", name.c_str()); }

std::string described() { return current; }

void watch_for_crashes() {
#if SHIFTADD_SANITIZED
    __sanitizer_set_death_callback(print_current);
#else
    const auto crashed = [](int signal) {
        print_current();
        std::signal(signal, SIG_DFL);
        std::raise(signal);
    };
    for (int signal : {SIGSEGV, SIGBUS, SIGABRT, SIGILL, SIGFPE}) std::signal(signal, crashed);
#endif
}

void Tally::expect(bool right, const std::string& name) {
    ++(right ? passed : failed);
    if (!right && failed <= kShown) std::printf("FAILED %s\n", name.c_str());
    if (!right && failed == kShown) std::printf("FAILED ... and possibly more\n");
}

void Tally::add(const Tally& other) {
    passed += other.passed;
    failed += other.failed;
}

}  // namespace shiftadd::check
