"""Times of several candidates that take turns, so that other load on the machine affects all of them."""

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
    """Elapsed seconds, and seconds of processor time summed over all threads of this process."""

    wall: float
    cpu: float

    def __sub__(self, earlier: Span) -> Span:
        return Span(self.wall - earlier.wall, self.cpu - earlier.cpu)

    def __truediv__(self, parts: int) -> Span:
        return Span(self.wall / parts, self.cpu / parts)


class Clock:
    """Measures wall and processor time together; tests pass their own clocks."""

    def __init__(
        self, wall: Callable[[], float] = time.perf_counter, cpu: Callable[[], float] = time.process_time
    ) -> None:
        self._wall, self._cpu = wall, cpu

    def now(self) -> Span:
        """Time since an arbitrary fixed moment."""
        return Span(self._wall(), self._cpu())

    def time(self, work: Callable[[], object]) -> Span:
        """Duration of `work`."""
        start = self.now()
        work()
        return self.now() - start


@dataclass(frozen=True)
class Spread:
    """The values of one measurement in all rounds."""

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
        """Ratio to `other` in every round; both ran in the same rounds, so that a disturbance slows both."""
        return Spread(tuple(one / two for one, two in zip(self.values, other.values, strict=True)))

    def to_dict(self) -> dict[str, object]:
        return {"median": self.median, "min": self.low, "max": self.high, "rounds": list(self.values)}


@dataclass(frozen=True)
class Timed:
    """Times of a piece of work in all rounds; `amount` is the work per round, in tokens or images."""

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
        """Processor time over wall time; less than the number of working threads means that they waited."""
        return Spread(tuple(span.cpu / span.wall for span in self.spans))

    def to_dict(self) -> dict[str, object]:
        cpu = Spread(tuple(span.cpu for span in self.spans))
        return {"amount": self.amount, "seconds": self.seconds.to_dict(), "cpu_seconds": cpu.to_dict()}


def turns(names: Sequence[K], rounds: int) -> list[tuple[int, K]]:
    """The order of runs as (round, name). Every round starts with the next name; round 0 is the uncounted warm-up."""
    order = []
    for turn in range(rounds + 1):
        first = turn % len(names)
        order += [(turn, name) for name in (*names[first:], *names[:first])]
    return order


def interleave(work: Mapping[K, Callable[[], T]], rounds: int, *, desc: str | None = None) -> dict[K, list[T]]:
    """Results of each piece of work in `rounds` rounds, in which they take turns, after a warm-up round.

    desc: label of the progress bar on standard error; None shows no bar.
    """
    order = turns(list(work), rounds)
    steps: Iterable[tuple[int, K]] = order if desc is None else progress(order, total=len(order), desc=desc)
    results: dict[K, list[T]] = {name: [] for name in work}
    for turn, name in steps:
        result = work[name]()
        if turn > 0:
            results[name].append(result)
    return results
