// Checks of the parts of a model's block other than its products, and of whole blocks.
#pragma once

#include <vector>

#include "block_problem.h"
#include "tally.h"

namespace shiftadd::check {

// 32-bit tables and units have the same bits in every instruction set, and 16-bit tables the same sums over words.
void check_tables(const Kernels& kernels, Random& random, Tally& tally);
// Rotations of rows against their definition.
void check_rotation(const Kernels& kernels, Random& random, bool quick, Tally& tally);
// Rows of 8-bit codes against their formula.
void check_codes(const Kernels& kernels, Random& random, Tally& tally);
// One head's attention over tokens with gaps between them, and the MLP's gate, each against its formula.
void check_attention(const Kernels& kernels, Random& random, Tally& tally);
// A whole block of a decoder, exact and fast, on one thread and on more.
void check_block(const Kernels& kernels, const BlockProblem& problem, const std::vector<double>& expected,
                 Tally& tally);

}  // namespace shiftadd::check
