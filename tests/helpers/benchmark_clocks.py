"""Clocks that tests control, in place of the machine's."""

from __future__ import annotations

from itertools import count

from shiftadd_cli.benchmark.timing import Clock


def ticking(cores: float = 1.0) -> Clock:
    """A clock that advances one second per reading, and `cores` seconds of processor time."""
    wall, cpu = count(), count()
    return Clock(lambda: float(next(wall)), lambda: cores * next(cpu))
