"""The compiled CPU kernels (native/), which an installation may lack: without a compiler the package is pure Python."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def cpu_extension() -> Any:
    """The extension module, or None where it was not built or cannot be loaded."""
    try:
        return importlib.import_module("shiftadd_cli.runtime.kernels._native")
    except ImportError:
        return None


def instruction_sets() -> tuple[str, ...]:
    """Names of the sets of kernels that run on this processor, the best first; empty without the extension."""
    extension = cpu_extension()
    return () if extension is None else tuple(extension.available())
