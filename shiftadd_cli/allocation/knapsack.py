"""Exact solver for one choice per group: the least total aim at a limited total load (multiple-choice knapsack).

The algorithm is Nemhauser and Ullmann's list of partial choices, pruned by bounds (Pisinger 1995, "A minimal algorithm
for the multiple-choice knapsack problem", does the same in another order). Groups are added one after another. A
partial choice is dropped if another has a smaller load and a smaller aim. It is also dropped if even a fractional
completion (along the lower convex hulls of the remaining groups) is worse than a good choice found by a first, capped
pass. The remaining list contains the optimum.

Loads and aims are summed in float64: integers up to 2^53 exactly, so that bytes count to the byte, and others to within
1e-12. The earlier solver, integer programming by HiGHS, keeps limits only within 1e-6 of their largest number. It had
to be called again with a smaller limit, and gave wrong answers or none for layers of very different sizes.
560 groups of four choices take .2 s, with hundreds of partial choices at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

# Maximum number of partial choices: in the first pass, which finds a good choice, and overall, to bound the memory. The
# overall cap applies only if losses are nearly proportional to sizes; the choices with the best bounds then remain.
_FEW, _MANY = 300, 1 << 17
# Change of a sum by another order of addition, relative to the sum.
_ROUNDING = 1e-12


def knapsack(
    aims: Sequence[Mapping[Key, float]],
    loads: Sequence[Mapping[Key, float]],
    limit: float,
    fits: Callable[[Sequence[Key]], bool],
) -> list[Key]:
    """The key chosen for every group: the least total of `aims` (by group and key) at a total load of at most `limit`.

    aims, loads: not negative; the same keys for each group. fits: decides exactly whether a choice is within the limit.
    The choice of the smallest loads must fit; the result always fits.
    """
    best = [min(aim, key=lambda key: (aim[key], load[key])) for aim, load in zip(aims, loads, strict=True)]
    if fits(best):
        return best
    search = _Search(aims, loads, limit * (1 + _ROUNDING))
    rough = search.choices(_FEW, math.inf)
    most = next((search.total(choice) for choice in rough if fits(choice)), math.inf)
    return next(
        (choice for choice in search.choices(_MANY, most) if fits(choice)),
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
        self._noise = _ROUNDING * sum(float(aim.max()) for aim in self._aims)
        hulls = [
            lower_hull(zip(load.tolist(), aim.tolist(), strict=True))
            for load, aim in zip(self._loads, self._aims, strict=True)
        ]
        # Sums of the first hull corners over each group and all later ones; and all steps of the hulls, best first.
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
        """Choices within the limit with an aim of at most `most`, smallest first, from at most `cap` partial ones."""
        import numpy as np

        load, aim = np.zeros(1), np.zeros(1)
        origins: list[Any] = []
        for group, (loads, aims) in enumerate(zip(self._loads, self._aims, strict=True)):
            load, aim = np.add.outer(load, loads).ravel(), np.add.outer(aim, aims).ravel()
            bound = self._bound(group + 1, load, aim)
            indices = np.flatnonzero(bound <= most + self._noise)
            indices = indices[np.lexsort((aim[indices], load[indices]))]
            # Equal loads are sorted by aim. An entry survives only if its aim is smaller than all before it.
            before = np.minimum.accumulate(np.concatenate(([math.inf], aim[indices][:-1])))[: len(indices)]
            indices = indices[aim[indices] < before]
            if len(indices) > cap:
                indices = indices[np.sort(np.argpartition(bound[indices], cap)[:cap])]
            origins.append(indices)
            load, aim = load[indices], aim[indices]
        for last in reversed(range(len(load))):
            yield self._trace(origins, last)

    def _bound(self, group: int, load: Any, aim: Any) -> Any:
        """Lower bound on the final aim of partial choices of the groups before `group`; infinite if none fits."""
        import numpy as np

        steps = self._steps[self._steps[:, 2] >= group]
        along = np.concatenate((np.zeros((1, 2)), steps[:, :2].cumsum(0)))
        start_load, start_aim = self._starts[group]
        room = self._limit - load - start_load
        least = aim + start_aim + np.interp(room, along[:, 0], along[:, 1])
        return np.where(room >= 0, least, math.inf)

    def _trace(self, origins: Sequence[Any], last: int) -> list[Key]:
        """The keys of a full choice, given its index in the final list."""
        chosen = []
        for indices, keys in zip(reversed(origins), reversed(self._keys), strict=True):
            last, position = divmod(int(indices[last]), len(keys))
            chosen.append(keys[position])
        return chosen[::-1]


def lower_hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners (load, aim) of the lower left convex hull, with increasing loads and decreasing aims."""
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
