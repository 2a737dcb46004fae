// The number of checks, the current check, and the required exactness of the kernels.
#pragma once

#include <string>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SHIFTADD_SANITIZED 1
#else
#define SHIFTADD_SANITIZED 0
#endif

namespace shiftadd::check {

// Half the distance between 1 and the next number. Sums of some hundred terms lose a few such roundings.
inline constexpr double kFloatRounding = 0x1p-24, kBFloat16Rounding = 0x1p-8;
inline constexpr double kExactRoundings = 32;
inline constexpr int kThreads = 4;

// Sets the current check, for the report of a crash.
void describe(const std::string& name);
// The current check.
std::string described();
// Lets crashes and sanitizers report it.
void watch_for_crashes();

class Tally {
public:
    // Counts a check, and prints the first failures.
    void expect(bool right, const std::string& name);
    void add(const Tally& other);

    long passed = 0, failed = 0;
    double roundings = 0, fast_error = 0;  // the largest so far

private:
    static constexpr long kShown = 20;
};

}  // namespace shiftadd::check
