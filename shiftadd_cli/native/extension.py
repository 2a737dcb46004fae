"""The compiled CPU kernels, which an installation may lack: without a compiler the package is pure Python.

This module imports only torch, because the quantizer uses the kernels too.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

# The types of activations, as in tensor.h.
TYPES = (torch.float32, torch.bfloat16)


@cache
def cpu_extension() -> Any:
    """The extension module, or None if it was not built or cannot be loaded."""
    try:
        extension = importlib.import_module("shiftadd_cli.native._native")
    except ImportError:
        return None
    if (team := _torchs_team()) is not None:
        extension.use_team(team)
    return extension


@torch.compiler.assume_constant_result
def has_kernels() -> bool:
    """Whether compiled kernels exist. torch.compile takes the result as a constant: it cannot trace the import."""
    return cpu_extension() is not None


def _torchs_team() -> int | None:
    """Address of the function that runs work on the threads of torch's own GNU OpenMP; None for other runtimes."""
    libraries = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    if not libraries:
        return None
    try:
        # The library is loaded already, so this is the instance that torch uses.
        function = ctypes.CDLL(str(libraries[0])).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def instruction_sets() -> tuple[str, ...]:
    """Names of the kernel sets that run on this processor, best first; empty without the extension."""
    extension = cpu_extension()
    return () if extension is None else tuple(extension.available())
