"""How much is said on standard error beside errors and warnings."""

from __future__ import annotations

import sys
from enum import Enum


class Verbosity(Enum):
    """QUIET: neither plans nor progress. VERBOSE: also what libraries say, and where an error arose."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


_chosen = Verbosity.NORMAL


def verbosity() -> Verbosity:
    """What holds for this process."""
    return _chosen


def set_verbosity(level: Verbosity) -> None:
    """Let it hold from now on."""
    global _chosen
    _chosen = level


def tell(text: str = "") -> None:
    """Say what is neither a result nor a warning, unless quiet."""
    if _chosen is not Verbosity.QUIET:
        print(text, file=sys.stderr, flush=True)
