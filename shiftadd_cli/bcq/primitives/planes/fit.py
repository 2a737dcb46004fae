"""Fit the scales of each group on its own: alternating least squares from one or several starts.

Binary-coding quantization of a group w: minimise Σ_k h_k (w_k − z − Σ_b α_b B_bk)² over signs B, scales α ≥ 0 and,
optionally, an offset z. Alternating between least squares and nearest levels is the method of LUT-GEMM (section 3) and
ShiftAddLLM (section 3). From the greedy start alone it falls into poor minima once q ≥ 3, so `search` also starts from
uniform grids clipped at several widths and keeps the best start per group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.bcq.options import FitMethod
from shiftadd_cli.bcq.primitives.planes.initial_scales import Scales, clipped_starts, greedy_start, uniform_grid
from shiftadd_cli.bcq.primitives.planes.linalg import solve_small
from shiftadd_cli.bcq.primitives.planes.sorted_fit import SortedGroups, fit_sorted
from shiftadd_cli.bcq.scale_formats import ScaleFormat

_SCREENING_ROUNDS = 2
# Groups are processed in pieces whose temporaries fit in the second-level cache.
_PIECE_WEIGHTS = 1 << 17
# Up to this many groups, fitting one after another is faster than the torch calls that fit them all at once.
_FEW_GROUPS = 16


@dataclass(frozen=True)
class GroupFit:
    """Scales `[groups, bits]` ≥ 0, offsets `[groups]` or None, and the normal matrix of each group under its nearest
    codes, `[groups, terms, terms]` with terms = bits, plus one for the offset."""

    scales: Tensor
    offsets: Tensor | None
    curvature: Tensor

    def times(self, factor: Tensor) -> GroupFit:
        """The fit of `factor` `[groups, 1]` times the weights."""
        offsets = None if self.offsets is None else self.offsets * factor.squeeze(-1)
        return GroupFit(self.scales * factor, offsets, self.curvature)


def fit_groups(
    weights: Tensor,
    importance: Tensor,
    bits: int,
    *,
    method: FitMethod = "search",
    rounds: int = 4,
    offset: bool = False,
    offset_limit: float = math.inf,
    rounding: ScaleFormat | None = None,
) -> GroupFit:
    """Fit every group of weights.

    weights: float32 `[groups, size]`. importance: h ≥ 0, `[groups, size]` (zero for padding). offset_limit: bound on
    |offset| in units of the group's largest scale, for formats that store it this way. rounding: the format to which
    the scales are rounded, one by one, in every round, as in the paper; None fits free scales.
    """
    if method == "greedy" and not offset and len(weights) <= _FEW_GROUPS:
        best_scales, matrices = fit_sorted(weights, importance, bits, rounds, rounding)
        return GroupFit(best_scales, None, matrices)
    pieces = max(1, _PIECE_WEIGHTS // weights.shape[1])
    scales, offsets, curvature = [], [], []
    for w, h in zip(weights.split(pieces), importance.split(pieces), strict=True):
        piece = _Piece(w, h, bits, offset, offset_limit, rounding)
        fit = piece.fit(method, rounds)
        curvature.append(piece.groups.normal_equations(fit).matrix)
        scales.append(fit.scales)
        if fit.offsets is not None:
            offsets.append(fit.offsets)
    return GroupFit(torch.cat(scales), torch.cat(offsets) if offsets else None, torch.cat(curvature))


class _Best:
    """The best fit seen so far, per group."""

    def __init__(self, groups: int, bits: int, offset: bool, like: Tensor) -> None:
        self.error = like.new_full((groups,), torch.inf, dtype=torch.float64)
        self.scales = like.new_zeros(groups, bits)
        self.offsets = like.new_zeros(groups) if offset else None

    def offer(self, fit: Scales, error: Tensor) -> None:
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scales = torch.where(better.unsqueeze(-1), fit.scales, self.scales)
        if self.offsets is not None and fit.offsets is not None:
            self.offsets = torch.where(better, fit.offsets, self.offsets)

    def fit(self) -> Scales:
        return Scales(self.scales, self.offsets)


class _Piece:
    """Some groups and the constraints on their fit."""

    def __init__(
        self,
        w: Tensor,
        h: Tensor,
        bits: int,
        offset: bool,
        limit: float,
        rounding: ScaleFormat | None,
    ) -> None:
        self.w, self.h, self.bits, self.offset, self.limit, self.rounding = w, h, bits, offset, limit, rounding
        self.groups = SortedGroups(w, h)

    def fit(self, method: FitMethod, rounds: int) -> Scales:
        w, h, bits = self.w, self.h, self.bits
        if method == "uniform":
            return uniform_grid(w, h, bits, self.offset, self.limit)
        best = _Best(len(w), bits, self.offset, w)
        # This start gets all rounds, so that a search is never worse than the greedy fit.
        self._alternate(greedy_start(w, h, bits), rounds, best)
        if method == "search":
            screening = min(rounds, _SCREENING_ROUNDS)
            for start in clipped_starts(w, h, bits, self.offset):
                self._alternate(start, screening, best)
            if rounds > screening:
                self._alternate(best.fit(), rounds - screening, best)
        return best.fit()

    def _alternate(self, start: Scales, rounds: int, best: _Best) -> None:
        """Offer the start and the fit after each round to `best`."""
        fit = self._admissible(start if self.offset else Scales(start.scales, None))
        equations = self.groups.normal_equations(fit)
        best.offer(fit, equations.error)
        for _ in range(rounds):
            last, fit = fit, self._admissible(self._solve(equations.matrix, equations.rhs))
            if fit.equals(last):
                break
            equations = self.groups.normal_equations(fit)
            best.offer(fit, equations.error)

    def _admissible(self, fit: Scales) -> Scales:
        """The fit with rounded scales and with offsets within their limit."""
        scales = fit.scales if self.rounding is None else self.rounding.round(fit.scales)
        if fit.offsets is None or math.isinf(self.limit):
            return Scales(scales, fit.offsets)
        bound = self.limit * scales.amax(-1)
        return Scales(scales, fit.offsets.clamp(-bound, bound))

    def _solve(self, matrix: Tensor, rhs: Tensor) -> Scales:
        """Least squares for fixed signs, with |offset| ≤ limit · largest scale."""
        bits = self.bits
        solution = solve_small(matrix, rhs)
        scales = solution[:, :bits].abs()
        if not self.offset:
            return Scales(scales, None)
        offsets = solution[:, bits]
        largest, plane = scales.max(-1)
        excess = offsets.abs() > self.limit * largest
        if math.isinf(self.limit) or not excess.any():
            return Scales(scales, offsets)
        # At the bound, the offset is a fixed multiple of the largest scale: its column joins the column of that plane.
        chosen = solution.gather(-1, plane.unsqueeze(-1)).squeeze(-1)
        factor = self.limit * torch.where(offsets * chosen < 0, -1.0, 1.0)
        fold = torch.nn.functional.one_hot(plane, bits).to(matrix.dtype) * factor.unsqueeze(-1)
        merge = torch.cat(
            (torch.eye(bits, dtype=fold.dtype, device=fold.device).expand(len(fold), -1, -1), fold.unsqueeze(-1)),
            dim=-1,
        )
        bound = solve_small(merge @ matrix @ merge.mT, (merge @ rhs.unsqueeze(-1)).squeeze(-1))
        scales = torch.where(excess.unsqueeze(-1), bound.abs(), scales)
        return Scales(scales, torch.where(excess, (fold * bound).sum(-1), offsets))
