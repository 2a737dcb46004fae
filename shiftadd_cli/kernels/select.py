"""Which kernels a compressed layer uses: what the machine has, and what the environment asks for.

    SHIFTADD_KERNEL     auto (default), reference (plain torch), cpu (look-up tables) or triton (CUDA)
    SHIFTADD_PRECISION  auto (default), exact (32-bit tables) or fast (16-bit tables), for cpu

Both are read when a checkpoint is loaded. Layers that the kernel asked for cannot compute (groups of a few columns,
shift layers, or on another device) take the reference. 16-bit tables keep outputs to 8e-4 of their size, where rounding
activations to bfloat16 alone costs 2e-3; so `auto` takes them for half-precision activations and 32-bit ones for
float32.
"""

from __future__ import annotations

import importlib.util
import os
from enum import Enum
from functools import cache
from typing import TypeVar

import torch

from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.errors import RuntimeChoiceError
from shiftadd_cli.kernels import cpu_weight, triton_weight
from shiftadd_cli.native.extension import cpu_extension

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

    def is_fast(self, dtype: torch.dtype) -> bool:
        """Whether activations of this dtype are looked up in 16-bit tables."""
        return self is Precision.FAST or (self is Precision.AUTO and dtype != torch.float32)


def chosen_kernel() -> Kernel:
    """What SHIFTADD_KERNEL asks for. Raises RuntimeChoiceError for what is no kernel or cannot run here."""
    kernel = _read("SHIFTADD_KERNEL", Kernel)
    if kernel is Kernel.CPU and cpu_extension() is None:
        raise RuntimeChoiceError(
            "SHIFTADD_KERNEL asks for cpu, but this installation has no compiled kernels; install a C++ compiler "
            "(g++ or clang) and then the package again, or leave SHIFTADD_KERNEL unset."
        )
    if kernel is Kernel.TRITON and not triton_runs():
        raise RuntimeChoiceError(
            "SHIFTADD_KERNEL asks for triton, which needs an NVIDIA GPU and the package triton; "
            "pip install triton, or leave SHIFTADD_KERNEL unset."
        )
    return kernel


def suited_kernel(layout: PackedLayout, device: torch.device) -> Kernel:
    """What a layer of this layout on this device computes with, never AUTO. Raises as `chosen_kernel`."""
    wish = chosen_kernel()
    if wish in (Kernel.AUTO, Kernel.CPU) and device.type == "cpu" and cpu_extension() and cpu_weight.supports(layout):
        return Kernel.CPU
    on_gpu = device.type == "cuda" or (wish is Kernel.TRITON and device.type == "cpu" and _interpreted())
    if wish in (Kernel.AUTO, Kernel.TRITON) and on_gpu and triton_runs() and triton_weight.supports(layout):
        return Kernel.TRITON
    return Kernel.REFERENCE


@cache
def triton_runs() -> bool:
    """Whether Triton is installed and there is a GPU for it, or its interpreter is on (TRITON_INTERPRET=1)."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and (torch.cuda.is_available() or _interpreted())


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


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
