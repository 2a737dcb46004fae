"""The choice of kernels for a compressed layer, from the machine and the environment.

    SHIFTADD_KERNEL     auto (default), reference (plain torch), cpu (look-up tables) or triton (CUDA)
    SHIFTADD_PRECISION  auto (default), exact (32-bit tables) or fast (16-bit tables), for cpu

Both are read when a checkpoint is loaded. Layers that the requested kernel cannot compute (groups of a few columns,
shift layers, or layers on another device) use the reference. 16-bit tables change outputs by less than 8e-4 of their
norm; rounding activations to bfloat16 alone costs 2e-3. So `auto` uses 16-bit tables for half-precision activations
and 32-bit tables for float32.
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
        """Whether activations of this dtype use 16-bit tables."""
        return self is Precision.FAST or (self is Precision.AUTO and dtype != torch.float32)


def chosen_kernel() -> Kernel:
    """The kernel that SHIFTADD_KERNEL requests. Raises RuntimeChoiceError if it is unknown or cannot run here."""
    kernel = _read("SHIFTADD_KERNEL", Kernel)
    if kernel is Kernel.CPU and cpu_extension() is None:
        raise RuntimeChoiceError(
            "SHIFTADD_KERNEL requests cpu, but this installation has no compiled kernels; install a C++ compiler "
            "(g++ or clang) and then the package again, or leave SHIFTADD_KERNEL unset."
        )
    if kernel is Kernel.TRITON and not triton_runs():
        raise RuntimeChoiceError(
            "SHIFTADD_KERNEL requests triton, which needs an NVIDIA GPU and the package triton; "
            "pip install triton, or leave SHIFTADD_KERNEL unset."
        )
    return kernel


def suited_kernel(layout: PackedLayout, device: torch.device) -> Kernel:
    """The kernel for a layer of this layout on this device, never AUTO. Raises the errors of `chosen_kernel`."""
    choice = chosen_kernel()
    if choice in (Kernel.AUTO, Kernel.CPU) and device.type == "cpu" and cpu_extension() and cpu_weight.supports(layout):
        return Kernel.CPU
    on_gpu = device.type == "cuda" or (choice is Kernel.TRITON and device.type == "cpu" and _interpreted())
    if choice in (Kernel.AUTO, Kernel.TRITON) and on_gpu and triton_runs() and triton_weight.supports(layout):
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
    """The precision that SHIFTADD_PRECISION requests. Raises RuntimeChoiceError if it is unknown."""
    return _read("SHIFTADD_PRECISION", Precision)


def _read(variable: str, kinds: type[E]) -> E:
    value = os.environ.get(variable, "").strip().lower() or "auto"
    try:
        return kinds(value)
    except ValueError:
        names = ", ".join(kind.value for kind in kinds)
        raise RuntimeChoiceError(f"{variable} is {value!r}; give one of {names}.") from None
