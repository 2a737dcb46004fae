"""Clocks that tests move, in place of the machine's."""

from __future__ import annotations

from itertools import count

from shiftadd_cli.benchmark.timing import Clock


def ticking(cores: float = 1.0) -> Clock:
    """A clock on which a second passes between readings, in which `cores` seconds of processor time go by."""
    wall, cpu = count(), count()
    return Clock(lambda: float(next(wall)), lambda: cores * next(cpu))
