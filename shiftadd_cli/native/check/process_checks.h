// Checks in processes of their own: children, and what happens where threads or memory run out.
#pragma once

#include "problem.h"
#include "tally.h"

namespace shiftadd::check {

// Children have none of their parent's workers, and start their own.
void check_fork(Random& random, Tally& tally);
// A process that may start no more threads computes with those that it has.
void check_without_threads(Tally& tally);
// A product that finds no memory says so, and the next one that does is right.
void check_without_memory(Random& random, Tally& tally);

}  // namespace shiftadd::check
