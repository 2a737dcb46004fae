"""How much is printed on standard error in addition to errors and warnings."""

from __future__ import annotations

import sys
from enum import Enum


class Verbosity(Enum):
    """QUIET: neither plans nor progress. VERBOSE: also the messages of libraries, and the traceback of an error."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


_chosen = Verbosity.NORMAL


def verbosity() -> Verbosity:
    """The verbosity of this process."""
    return _chosen


def set_verbosity(level: Verbosity) -> None:
    """Set the verbosity of this process."""
    global _chosen
    _chosen = level


def tell(text: str = "") -> None:
    """Print text that is neither a result nor a warning, unless quiet."""
    if _chosen is not Verbosity.QUIET:
        print(text, file=sys.stderr, flush=True)
