// Products with rows of 8-bit codes and one scale per row, for an output head.
#pragma once

#include "engine.h"

namespace shiftadd {

struct CodeRows {
    const int8_t* codes;  // [rows][columns]
    const void* scale;    // [rows]
    Number scale_type;
    int64_t rows, columns;
};

// y = (x codes') scale, summed in float32. `output` [rows of x][rows of codes] has the type of the activations, which
// have no rotation. Its bits depend neither on `threads` nor on concurrent calls.
void multiply_codes(const Kernels& kernels, const CodeRows& matrix, const Activations& input, void* output,
                    int threads);

}  // namespace shiftadd
