"""A piece of work that all models of a benchmark do in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shiftadd_cli.benchmark.timing import Clock, Span


@dataclass(frozen=True)
class Work:
    """`run(model, clock)` gives the times of its `parts`, or of more; a part has a name, and so many tokens or images
    that it is about."""

    run: Callable[[Any, Clock], Sequence[Span]]
    parts: tuple[tuple[str, int], ...]
