"""Which kernels a compressed layer uses: what the machine has, and what the environment asks for.

    SHIFTADD_KERNEL     auto (default), reference (plain torch), cpu (look-up tables) or triton (CUDA)
    SHIFTADD_PRECISION  auto (default), exact (32-bit tables) or fast (16-bit tables), for cpu

Both are read when a checkpoint is loaded. 16-bit tables keep outputs to 8e-4 of their size, where rounding activations
to bfloat16 alone costs 2e-3; so `auto` takes them for half-precision activations and 32-bit ones for float32.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import TypeVar

from shiftadd_cli.errors import RuntimeChoiceError
from shiftadd_cli.runtime.kernels.extension import cpu_extension

E = TypeVar("E", bound=Enum)


class Kernel(Enum):
    """Ways to compute a compressed layer."""

    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"


class Precision(Enum):
    """Widths of the look-up tables of the CPU kernels."""

    AUTO = "auto"
    EXACT = "exact"
    FAST = "fast"


def chosen_kernel() -> Kernel:
    """What SHIFTADD_KERNEL asks for. Raises RuntimeChoiceError for what is no kernel or cannot run here."""
    kernel = _read("SHIFTADD_KERNEL", Kernel)
    if kernel is Kernel.CPU and cpu_extension() is None:
        raise RuntimeChoiceError(
            "SHIFTADD_KERNEL asks for cpu, but this installation has no compiled kernels; install a C++ compiler "
            "(g++ or clang) and then the package again, or leave SHIFTADD_KERNEL unset."
        )
    return kernel


def chosen_precision() -> Precision:
    """What SHIFTADD_PRECISION asks for. Raises RuntimeChoiceError for what is no precision."""
    return _read("SHIFTADD_PRECISION", Precision)


def _read(variable: str, kinds: type[E]) -> E:
    value = os.environ.get(variable, "").strip().lower() or "auto"
    try:
        return kinds(value)
    except ValueError:
        names = ", ".join(each.value for each in kinds)
        raise RuntimeChoiceError(f"{variable} is {value!r}; give one of {names}.") from None
