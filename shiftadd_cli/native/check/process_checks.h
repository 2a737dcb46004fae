// Checks in separate processes: children, and processes that run out of threads or memory.
#pragma once

#include "problem.h"
#include "tally.h"

namespace shiftadd::check {

// Children do not have their parent's workers, and start their own.
void check_fork(Random& random, Tally& tally);
// A process that cannot start more threads computes with those that it has.
void check_without_threads(Tally& tally);
// A product without enough memory throws, and the next one with enough memory is right.
void check_without_memory(Random& random, Tally& tally);

}  // namespace shiftadd::check
