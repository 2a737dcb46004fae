// One linear layer, and the choice of its kernels.
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

// Kernels that this build contains and this processor can run, best first.
const Kernels* const* available_kernels();
const Kernels* find_kernels(const char* name);

// y = x W' + bias. `output` [rows of x][rows of W] has the type of the activations. Its bits depend neither on
// `threads` nor on concurrent calls. `fast`: look up in 16-bit tables, and multiply bfloat16 activations as bfloat16 if
// the processor can.
void linear(const Kernels& kernels, const Matrix& matrix, const Activations& input, void* output, bool fast,
            Method method, int threads);

// R x for each row. `output` [rows][columns] has the type of the activations, whose rotation must have signs.
void rotate_rows(const Kernels& kernels, const Activations& input, int64_t columns, void* output, int threads);

}  // namespace shiftadd
