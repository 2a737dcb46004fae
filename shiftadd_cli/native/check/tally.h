// What is counted, what is being checked, and how exact the kernels have to be.
#pragma once

#include <string>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SHIFTADD_SANITIZED 1
#else
#define SHIFTADD_SANITIZED 0
#endif

namespace shiftadd::check {

// Half the distance between 1 and the next number. Sums of some hundred terms lose a few of them.
inline constexpr double kFloatRounding = 0x1p-24, kBFloat16Rounding = 0x1p-8;
inline constexpr double kExactRoundings = 32;
inline constexpr int kThreads = 4;

// Says what is being checked, for whoever ends the program.
void describe(const std::string& what);
// What was said last.
std::string described();
// Has a crash, or a sanitizer, tell it.
void watch_for_crashes();

class Tally {
public:
    // Counts a check, and prints the first that fail.
    void expect(bool right, const std::string& what);
    void add(const Tally& other);

    long passed = 0, failed = 0;
    double roundings = 0, fast_error = 0;  // the largest

private:
    static constexpr long kShown = 20;
};

}  // namespace shiftadd::check
