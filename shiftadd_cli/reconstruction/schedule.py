"""What tuning by gradient has in common: which batches it may see, and how its rates rise and fall."""

from __future__ import annotations

from collections.abc import Callable

_WARM_UP_STEPS = 5
# One in so many batches is held back.
_HELD_BACK = 8


def hold_back(batches: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to tune on, and of those, the last, that decide whether it helped. Of two at least."""
    numbers = list(range(batches))
    kept = max(1, batches // _HELD_BACK)
    return numbers[:-kept], numbers[-kept:]


def rising_and_falling(steps: int) -> Callable[[int], float]:
    """Share of the rate at step 0, 1, ... of so many: up in a few steps, then down to nothing linearly."""
    return lambda step: min(1, (step + 1) / _WARM_UP_STEPS) * (1 - step / steps)
