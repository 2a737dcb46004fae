"""The fit of `fit.py` for a few large groups, without offsets, one group at a time.

With running sums a round of alternating least squares is one binary search per midpoint and arithmetic on 2^q numbers,
whatever the size of the group. That is too little work for tensors: in Python floats a round takes less time than a
handful of calls of torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from operator import mul

from torch import Tensor

from shiftadd_cli.bcq.intervals import SortedGroups
from shiftadd_cli.bcq.levels import code_signs
from shiftadd_cli.bcq.linalg import solve_floats
from shiftadd_cli.bcq.scale_formats import ScaleFormat
from shiftadd_cli.bcq.starts import greedy_start


def fit_sorted(
    weights: Tensor, importance: Tensor, bits: int, rounds: int, rounding: ScaleFormat | None
) -> tuple[Tensor, Tensor]:
    """`fit_groups` with the method `greedy` and no offset: scales `[groups, bits]` and normal matrices
    `[groups, bits, bits]` of weights and importance `[groups, size]`."""
    starts = greedy_start(weights, importance, bits).scales.tolist()
    groups = SortedGroups(weights, importance)
    fits = [SortedGroup(groups, i).alternate(start, rounds, rounding) for i, start in enumerate(starts)]
    return weights.new_tensor([scales for scales, _ in fits]), weights.new_tensor([matrix for _, matrix in fits])


class SortedGroup:
    """One of `groups`, in lists."""

    def __init__(self, groups: SortedGroups, index: int) -> None:
        self.weights: list[float] = groups.ordered[index].tolist()
        self.mass: list[float]
        self.moment: list[float]
        self.mass, self.moment = groups.sums[index].tolist()
        self.energy = float(groups.energy[index])

    def alternate(
        self, start: Sequence[float], rounds: int, rounding: ScaleFormat | None
    ) -> tuple[list[float], list[list[float]]]:
        """The best scales met from `start` on, and their normal matrix."""
        scales = _rounded(start, rounding)
        matrix, rhs = self.normal_equations(scales)
        best, best_error = (scales, matrix), self.error(scales, matrix, rhs)
        seen = {tuple(scales)}
        for _ in range(rounds):
            scales = _rounded([abs(scale) for scale in solve_floats(matrix, rhs)], rounding)
            # Scales met before lead to nothing but what followed them then.
            if tuple(scales) in seen:
                break
            seen.add(tuple(scales))
            matrix, rhs = self.normal_equations(scales)
            error = self.error(scales, matrix, rhs)
            if error < best_error:
                best, best_error = (scales, matrix), error
        return best

    def normal_equations(self, scales: Sequence[float]) -> tuple[list[list[float]], list[float]]:
        """Weighted least squares under nearest codes: matrix `[bits][bits]` and right-hand side `[bits]`."""
        bits = len(scales)
        levels = [-sum(scales)]
        for scale in scales:
            levels += [level + 2 * scale for level in levels]
        codes = sorted(range(len(levels)), key=levels.__getitem__)
        mass, moment = [0.0] * len(levels), [0.0] * len(levels)
        start = 0
        for code, above in pairwise(codes):
            # As in `LevelTable.nearest`, a weight on a midpoint goes to the lower level.
            stop = bisect_right(self.weights, (levels[code] + levels[above]) / 2, start)
            mass[code] = self.mass[stop] - self.mass[start]
            moment[code] = self.moment[stop] - self.moment[start]
            start = stop
        mass[codes[-1]] = self.mass[-1] - self.mass[start]
        moment[codes[-1]] = self.moment[-1] - self.moment[start]
        planes, products = _signs(bits)
        matrix = [[self.mass[-1]] * bits for _ in range(bits)]
        for i in range(bits):
            for j in range(i):
                matrix[i][j] = matrix[j][i] = sum(map(mul, mass, products[i][j]))
        return matrix, [sum(map(mul, moment, plane)) for plane in planes]

    def error(self, scales: Sequence[float], matrix: Sequence[Sequence[float]], rhs: Sequence[float]) -> float:
        """Σ h (w − level)² of the codes these normal equations belong to."""
        error = self.energy
        for scale, row, side in zip(scales, matrix, rhs, strict=True):
            error += scale * (sum(map(mul, row, scales)) - 2 * side)
        return error


@cache
def _signs(bits: int) -> tuple[list[list[float]], list[list[list[float]]]]:
    """Sign of each plane in every code, `[bits][2 ** bits]`, and products of two, `[bits][bits][2 ** bits]`."""
    planes = code_signs(bits).T
    return planes.tolist(), (planes.unsqueeze(0) * planes.unsqueeze(1)).tolist()


def _rounded(scales: Sequence[float], form: ScaleFormat | None) -> list[float]:
    return list(scales) if form is None else [form.round_one(scale) for scale in scales]
