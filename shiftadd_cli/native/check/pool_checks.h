// Checks of the threads that all kernels share.
#pragma once

#include "tally.h"

namespace shiftadd::check {

// Every task of a round once, whatever rounds came before it and whoever else asks.
void check_pool(int rounds, Tally& tally);
// A task that throws, as one that gets no memory does: its caller gets the exception, after all others are done.
void check_exceptions(Tally& tally);
// Rounds within one call of a team, from several threads of the program at once.
void check_together(int rounds, Tally& tally);

}  // namespace shiftadd::check
