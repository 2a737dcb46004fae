"""One choice for each group: the least total of one thing at a limited total of another, solved to the optimum.

Nemhauser and Ullmann's list of partial choices, kept short by bounds (Pisinger 1995, "A minimal algorithm for the
multiple-choice knapsack problem", does the same in another order). Groups are added one after another. Of the partial
choices so far, one that has both a larger load and a larger aim than another is dropped; so is one whose rest cannot be
chosen well enough even in fractions (of the lower convex hulls of the groups that are left), compared to a good choice
that a first, capped pass has found. What is left at the end has the optimum in it.

Loads and aims are added in float64: whole numbers up to 2^53 exactly, so that bytes count to the byte, and others to
within 1e-12. Integer programming by HiGHS, which came before, keeps limits within 1e-6 of their largest number, so it
had to be asked again with a smaller limit; on layers of very different sizes that gave wrong answers, or none.
560 groups of four choices take .2 s, with hundreds of partial choices at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

# Partial choices in the pass that finds a good choice; and at all, so that memory is bounded. Where that many cannot be
# told apart, which takes losses that are proportional to sizes, those with the best bounds are kept.
_FEW, _MANY = 300, 1 << 17
# What adding up in another order may change, relative to the sum.
_ROUNDING = 1e-12


def knapsack(
    aims: Sequence[Mapping[Key, float]],
    loads: Sequence[Mapping[Key, float]],
    limit: float,
    fits: Callable[[Sequence[Key]], bool],
) -> list[Key]:
    """The key chosen for every group: the least total of `aims` (by group and key) at a total load of at most `limit`.

    aims, loads: not negative; the same keys for each group. fits: tells exactly whether a choice is within the limit,
    which the least of all loads must be; what is returned fits.
    """
    best = [min(aim, key=lambda key: (aim[key], load[key])) for aim, load in zip(aims, loads, strict=True)]
    if fits(best):
        return best
    search = _Search(aims, loads, limit * (1 + _ROUNDING))
    rough = search.choices(_FEW, math.inf)
    most = next((search.total(each) for each in rough if fits(each)), math.inf)
    return next(
        (each for each in search.choices(_MANY, most) if fits(each)),
        [min(load, key=lambda key: (load[key], aim[key])) for aim, load in zip(aims, loads, strict=True)],
    )


class _Search(Generic[Key]):
    def __init__(self, aims: Sequence[Mapping[Key, float]], loads: Sequence[Mapping[Key, float]], limit: float) -> None:
        import numpy as np

        self._keys = [list(load) for load in loads]
        self._aims = [np.array([aim[key] for key in keys], float) for aim, keys in zip(aims, self._keys, strict=True)]
        self._loads = [
            np.array([load[key] for key in keys], float) for load, keys in zip(loads, self._keys, strict=True)
        ]
        self._limit = limit
        self._noise = _ROUNDING * sum(float(each.max()) for each in self._aims)
        hulls = [
            lower_hull(zip(load.tolist(), aim.tolist(), strict=True))
            for load, aim in zip(self._loads, self._aims, strict=True)
        ]
        # Where the hulls of the groups from each on start, together; and their steps, the best first.
        self._starts = np.array([hull[0] for hull in hulls] + [(0.0, 0.0)])[::-1].cumsum(0)[::-1]
        steps = [
            (second[0] - first[0], second[1] - first[1], owner)
            for owner, hull in enumerate(hulls)
            for first, second in pairwise(hull)
        ]
        self._steps = np.array(sorted(steps, key=lambda step: step[1] / step[0])).reshape(-1, 3)

    def total(self, chosen: Sequence[Key]) -> float:
        return sum(float(aim[keys.index(key)]) for aim, keys, key in zip(self._aims, self._keys, chosen, strict=True))

    def choices(self, cap: int, most: float) -> Iterator[list[Key]]:
        """Choices within the limit whose aim is at most `most`, the least first, from at most `cap` partial ones."""
        import numpy as np

        load, aim = np.zeros(1), np.zeros(1)
        origins: list[Any] = []
        for group, (loads, aims) in enumerate(zip(self._loads, self._aims, strict=True)):
            load, aim = np.add.outer(load, loads).ravel(), np.add.outer(aim, aims).ravel()
            bound = self._bound(group + 1, load, aim)
            kept = np.flatnonzero(bound <= most + self._noise)
            kept = kept[np.lexsort((aim[kept], load[kept]))]
            # Of equal loads the least aim comes first; what follows must have a smaller one.
            before = np.minimum.accumulate(np.concatenate(([math.inf], aim[kept][:-1])))[: len(kept)]
            kept = kept[aim[kept] < before]
            if len(kept) > cap:
                kept = kept[np.sort(np.argpartition(bound[kept], cap)[:cap])]
            origins.append(kept)
            load, aim = load[kept], aim[kept]
        for last in reversed(range(len(load))):
            yield self._trace(origins, last)

    def _bound(self, group: int, load: Any, aim: Any) -> Any:
        """The least aim that partial choices of the groups before `group` can end with; infinite where none fits."""
        import numpy as np

        steps = self._steps[self._steps[:, 2] >= group]
        along = np.concatenate((np.zeros((1, 2)), steps[:, :2].cumsum(0)))
        start_load, start_aim = self._starts[group]
        room = self._limit - load - start_load
        least = aim + start_aim + np.interp(room, along[:, 0], along[:, 1])
        return np.where(room >= 0, least, math.inf)

    def _trace(self, origins: Sequence[Any], last: int) -> list[Key]:
        """The keys of a full choice, from the number it has at the end."""
        found = []
        for kept, keys in zip(reversed(origins), reversed(self._keys), strict=True):
            last, place = divmod(int(kept[last]), len(keys))
            found.append(keys[place])
        return found[::-1]


def lower_hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners (load, aim) of the lower left convex hull, loads rising and aims falling."""
    corners: list[tuple[float, float]] = []
    for load, aim in sorted(points):
        if corners and aim >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (first, high), (second, low) = corners[-2:]
            if (low - high) * (load - second) < (aim - low) * (second - first):
                break
            corners.pop()
        corners.append((load, aim))
    return corners
