// One linear layer: activations in, output out, by the kernels of the best instruction set there is.
#pragma once

#include "lookups.h"

namespace shiftadd {

struct Activations {
    const void* values;  // [rows][columns]
    Number type;
    int64_t rows;
    Rotation rotation;
};

enum class Method { kAutomatic, kLookUp, kMultiply };

// Instruction sets that this build has and this processor can run, best first.
const Kernels* const* available_kernels();
const Kernels* find_kernels(const char* name);

// y = x W' + bias, `output` [rows of x][rows of W] in the type of the activations. `fast`: look up in 16-bit tables,
// and multiply bfloat16 activations as such where the processor can.
// Neither `threads` nor other calls at the same time change a bit of it.
void linear(const Kernels& kernels, const Matrix& matrix, const Activations& input, void* output, bool fast,
            Method method, int threads);

// R x for each row, `output` [rows][columns] in the type of the activations, whose rotation has signs.
void rotate_rows(const Kernels& kernels, const Activations& input, int64_t columns, void* output, int threads);

}  // namespace shiftadd
