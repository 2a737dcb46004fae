"""Returning freed memory to the system."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Hand memory that was freed back to the system, where the C library can be asked to (glibc); else do nothing.

    glibc keeps what was freed between blocks that live on. Measured on SmolLM2 from GGUF, 30 blocks of 7 MB loaded
    and released one after another: resident memory grew by 100 MB in the first pass and 150 MB in six, and not at all
    when trimmed after each block, which takes 1 to 2 ms.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # another C library (musl) has no such function, and needs none
        return
