"""Times of several candidates taken in turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from shiftadd_cli.progress import progress

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """Seconds that passed, and seconds of processor time that all threads of this process took together."""

    wall: float
    cpu: float

    def __sub__(self, earlier: Span) -> Span:
        return Span(self.wall - earlier.wall, self.cpu - earlier.cpu)

    def __truediv__(self, parts: int) -> Span:
        return Span(self.wall / parts, self.cpu / parts)


class Clock:
    """Both times at once; tests bring clocks of their own."""

    def __init__(
        self, wall: Callable[[], float] = time.perf_counter, cpu: Callable[[], float] = time.process_time
    ) -> None:
        self._wall, self._cpu = wall, cpu

    def now(self) -> Span:
        """Since some moment that stays the same."""
        return Span(self._wall(), self._cpu())

    def time(self, work: Callable[[], object]) -> Span:
        """How long `work` takes."""
        start = self.now()
        work()
        return self.now() - start


@dataclass(frozen=True)
class Spread:
    """The same number found in every round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def over(self, other: Spread) -> Spread:
        """Ratio of the two in every round, whose rounds were the same: what slows one slows the other."""
        return Spread(tuple(one / two for one, two in zip(self.values, other.values, strict=True)))

    def to_dict(self) -> dict[str, object]:
        return {"median": self.median, "min": self.low, "max": self.high, "rounds": list(self.values)}


@dataclass(frozen=True)
class Timed:
    """A piece of work in every round; `amount` is how much of it one round is, in tokens or the like."""

    spans: tuple[Span, ...]
    amount: int = 1

    @property
    def seconds(self) -> Spread:
        """Wall time."""
        return Spread(tuple(span.wall for span in self.spans))

    @property
    def rate(self) -> Spread:
        """Amount per second of wall time."""
        return Spread(tuple(self.amount / span.wall for span in self.spans))

    @property
    def cores(self) -> Spread:
        """Processor time over wall time: less than the threads at work says that they waited."""
        return Spread(tuple(span.cpu / span.wall for span in self.spans))

    def to_dict(self) -> dict[str, object]:
        cpu = Spread(tuple(span.cpu for span in self.spans))
        return {"amount": self.amount, "seconds": self.seconds.to_dict(), "cpu_seconds": cpu.to_dict()}


def turns(names: Sequence[K], rounds: int) -> list[tuple[int, K]]:
    """Who runs when: (round, name), every round starting with the next name; round 0 is the one that is not counted."""
    order = []
    for turn in range(rounds + 1):
        first = turn % len(names)
        order += [(turn, name) for name in (*names[first:], *names[:first])]
    return order


def interleave(work: Mapping[K, Callable[[], T]], rounds: int, *, desc: str | None = None) -> dict[K, list[T]]:
    """What each piece of work gives in each of `rounds` rounds, in which they take turns, after one to warm up.

    desc: what the progress on standard error is called; None shows none.
    """
    order = turns(list(work), rounds)
    steps: Iterable[tuple[int, K]] = order if desc is None else progress(order, total=len(order), desc=desc)
    found: dict[K, list[T]] = {name: [] for name in work}
    for turn, name in steps:
        result = work[name]()
        if turn > 0:
            found[name].append(result)
    return found
