"""The compiled CPU kernels, which an installation may lack: without a compiler the package is pure Python.

Imports torch alone: what quantizes calls the kernels too.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# As `Number` in kernels.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1}


@cache
def cpu_extension() -> Any:
    """The extension module, or None where it was not built or cannot be loaded."""
    try:
        extension = importlib.import_module("shiftadd_cli.native._native")
    except ImportError:
        return None
    if (team := _torchs_team()) is not None:
        extension.use_team(team)
    return extension


@torch.compiler.assume_constant_result
def has_kernels() -> bool:
    """Whether there are compiled kernels. A compiler takes the answer: it could not follow how it is found."""
    return cpu_extension() is not None


def _torchs_team() -> int | None:
    """Address of the function by which torch's own GNU OpenMP runtime runs work on its threads; None for another."""
    libraries = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    if not libraries:
        return None
    try:
        # It is loaded already, so this gives the very one that torch uses.
        function = ctypes.CDLL(str(libraries[0])).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies, as the extension takes it; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def instruction_sets() -> tuple[str, ...]:
    """Names of the sets of kernels that run on this processor, the best first; empty without the extension."""
    extension = cpu_extension()
    return () if extension is None else tuple(extension.available())
