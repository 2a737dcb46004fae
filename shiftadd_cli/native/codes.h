// Products with rows of 8-bit codes, each with one scale: an output head.
#pragma once

#include "engine.h"

namespace shiftadd {

struct CodeRows {
    const int8_t* codes;  // [rows][columns]
    const void* scale;    // [rows]
    Number scale_type;
    int64_t rows, columns;
};

// y = (x codes') scale, summed in float32, `output` [rows of x][rows of codes] in the type of the activations, which
// have no rotation. Neither `threads` nor other calls at the same time change a bit of it.
void multiply_codes(const Kernels& kernels, const CodeRows& matrix, const Activations& input, void* output,
                    int threads);

}  // namespace shiftadd
