// Checks of single products with a compressed matrix, in every way they can be computed.
#pragma once

#include <string>

#include "problem.h"
#include "tally.h"

namespace shiftadd::check {

struct Way {
    Method method;
    bool fast;

    std::string name() const {
        static constexpr const char* kNames[] = {"automatic", "look-up", "multiply"};
        return std::string(kNames[static_cast<int>(method)]) + (fast ? " fast" : " exact");
    }
};

inline constexpr Way kWays[] = {{Method::kLookUp, false},   {Method::kLookUp, true},
                                {Method::kMultiply, false}, {Method::kMultiply, true},
                                {Method::kAutomatic, false}, {Method::kAutomatic, true}};

// The output of a problem, [batch][rows].
Numbers product(const Kernels& kernels, const Problem& problem, Way way, int threads);

// Unpacking restores the packed planes, and padding is zero.
void check_packing(const Problem& problem, Tally& tally);
// Every way against the expected values, and any number of threads against one.
void check_products(const Kernels& kernels, const Problem& problem, const Expected& expected, Tally& tally);
// An activation that is not finite spoils only its own row of the output.
void check_not_finite(const Kernels& kernels, Random& random, Tally& tally);
// Several threads of the program at the same time, each with its own problem.
void check_concurrent_calls(const Kernels& kernels, Random& random, int repeats, Tally& tally);

}  // namespace shiftadd::check
