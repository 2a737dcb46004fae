"""The fit of `fit.py` for a few large groups without offsets, one group at a time.

With running sums, a round of alternating least squares is one binary search per midpoint and arithmetic on 2^q numbers,
whatever the size of the group. That is too little work for tensors: in Python floats a round takes less time than a
handful of torch calls.

Nearest codes divide the sorted weights of a group into 2^q intervals, one per level. The normal equations and the error
of a fit need only Σ h and Σ h·w of every interval, which are differences of running sums.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from operator import mul

import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import code_signs, sorted_levels
from shiftadd_cli.bcq.primitives.planes.initial_scales import Scales, greedy_start
from shiftadd_cli.bcq.primitives.planes.linalg import solve_floats
from shiftadd_cli.bcq.scale_formats import ScaleFormat


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
    """One of `groups`, as Python lists."""

    def __init__(self, groups: SortedGroups, index: int) -> None:
        self.weights: list[float] = groups.ordered[index].tolist()
        self.mass: list[float]
        self.moment: list[float]
        self.mass, self.moment = groups.sums[index].tolist()
        self.energy = float(groups.energy[index])

    def alternate(
        self, start: Sequence[float], rounds: int, rounding: ScaleFormat | None
    ) -> tuple[list[float], list[list[float]]]:
        """The best scales of all rounds, `start` included, and their normal matrix."""
        scales = _rounded(start, rounding)
        matrix, rhs = self.normal_equations(scales)
        best, best_error = (scales, matrix), self.error(scales, matrix, rhs)
        seen = {tuple(scales)}
        for _ in range(rounds):
            scales = _rounded([abs(scale) for scale in solve_floats(matrix, rhs)], rounding)
            # A round depends on the scales alone, so scales seen before would only repeat earlier rounds.
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
        """Σ h (w − level)² under the codes of these normal equations."""
        error = self.energy
        for scale, row, side in zip(scales, matrix, rhs, strict=True):
            error += scale * (sum(map(mul, row, scales)) - 2 * side)
        return error


@cache
def _signs(bits: int) -> tuple[list[list[float]], list[list[list[float]]]]:
    """Signs of each plane in every code, `[bits][2 ** bits]`, and products of two, `[bits][bits][2 ** bits]`."""
    planes = code_signs(bits).T
    return planes.tolist(), (planes.unsqueeze(0) * planes.unsqueeze(1)).tolist()


def _rounded(scales: Sequence[float], form: ScaleFormat | None) -> list[float]:
    return list(scales) if form is None else [form.round_one(scale) for scale in scales]


@dataclass(frozen=True)
class NormalEquations:
    """Weighted least squares under nearest codes: `matrix` `[groups, terms, terms]` and `rhs` `[groups, terms]` with
    terms = bits, plus one for the offset; `error` float64 `[groups]` is Σ h (w − level)²."""

    matrix: Tensor
    rhs: Tensor
    error: Tensor


class SortedGroups:
    """Weights and importance h ≥ 0 of groups, float32 `[groups, size]`.

    `ordered` float32 `[groups, size]` are the weights in ascending order; `sums` float64 `[groups, 2, size + 1]` holds
    Σ h and Σ h·w of the first k of them, and `energy` float64 `[groups]` the total Σ h·w².
    """

    def __init__(self, weights: Tensor, importance: Tensor) -> None:
        self.ordered, order = weights.contiguous().sort(dim=-1)
        # float64, because an interval is a difference of large sums, and so is the error.
        self.sums = torch.zeros(len(weights), 2, weights.shape[1] + 1, dtype=torch.float64, device=weights.device)
        terms = self.sums[:, :, 1:]
        terms[:, 0] = importance.gather(1, order)
        torch.mul(terms[:, 0], self.ordered, out=terms[:, 1])
        self.energy = (terms[:, 1] * self.ordered).sum(-1)
        torch.cumsum(terms, dim=-1, out=terms)

    def normal_equations(self, fit: Scales) -> NormalEquations:
        """The normal equations under the nearest codes of scales `[groups, bits]` and offsets."""
        levels, codes = sorted_levels(fit.scales, fit.offsets)
        midpoints = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = torch.full_like(codes, self.ordered.shape[1])
        # As in `LevelTable.nearest`, a weight on a midpoint goes to the lower level.
        ends[:, :-1] = torch.searchsorted(self.ordered, midpoints, right=True)
        below = self.sums.gather(2, ends.unsqueeze(1).expand(-1, 2, -1))
        rank_sums = torch.diff(below, dim=-1, prepend=below.new_zeros(()).expand(len(below), 2, 1))
        code_sums = torch.empty_like(rank_sums).scatter_(2, codes.unsqueeze(1).expand(-1, 2, -1), rank_sums)
        terms, products = (part.to(code_sums) for part in _basis(fit.scales.shape[1], fit.offsets is not None))
        matrix = (code_sums[:, 0] @ products).view(len(codes), terms.shape[1], -1)
        rhs = code_sums[:, 1] @ terms
        x = fit.scales if fit.offsets is None else torch.cat((fit.scales, fit.offsets.unsqueeze(-1)), dim=-1)
        x = x.to(rhs)
        error = self.energy + (((matrix @ x.unsqueeze(-1)).squeeze(-1) - 2 * rhs) * x).sum(-1)
        return NormalEquations(matrix.to(levels), rhs.to(levels), error)


@cache
def _basis(bits: int, offset: bool) -> tuple[Tensor, Tensor]:
    """Signs of each plane in every code, plus a one for the offset, `[2 ** bits, terms]`; and products of two of them,
    `[2 ** bits, terms ** 2]`; both float64."""
    signs = torch.nn.functional.pad(code_signs(bits).double(), (0, int(offset)), value=1.0)
    return signs, (signs.unsqueeze(1) * signs.unsqueeze(2)).flatten(1)
