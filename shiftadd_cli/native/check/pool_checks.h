// Checks of the threads that all kernels share.
#pragma once

#include "tally.h"

namespace shiftadd::check {

// Every task of a round runs once, regardless of earlier rounds and concurrent callers.
void check_pool(int rounds, Tally& tally);
// A task that throws, for example for lack of memory: its caller gets the exception after all other tasks are done.
void check_exceptions(Tally& tally);
// Rounds within one call of a team, from several threads of the program at the same time.
void check_together(int rounds, Tally& tally);

}  // namespace shiftadd::check
