"""Fit the scales of each group by itself: alternating least squares from one or several starts.

Binary-coding quantization of a group w: minimise Σ_k h_k (w_k − z − Σ_b α_b B_bk)² over signs B, scales α ≥ 0 and,
optionally, an offset z. Alternating least squares and nearest level is the method of LUT-GEMM (section 3) and
ShiftAddLLM (section 3); it falls into poor minima from the greedy start alone once q ≥ 3, so `search` also starts
from uniform grids clipped at several widths and keeps the best start per group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import LevelTable
from shiftadd_cli.bcq.linalg import solve_small
from shiftadd_cli.bcq.scale_formats import ScaleFormat
from shiftadd_cli.bcq.sorted_fit import fit_sorted
from shiftadd_cli.bcq.starts import Scales, clipped_starts, greedy_start, uniform_grid

FitMethod = Literal["search", "greedy", "uniform"]

_SCREENING_ROUNDS = 2
# Groups are handled in pieces whose temporaries stay in the second-level cache.
_PIECE_WEIGHTS = 1 << 17
# Up to this many groups, fitting one after another beats the calls of torch that fit them all at once.
_FEW_GROUPS = 16
# Up to this many midpoints, counting those below a weight beats a binary search.
_COUNTED_MIDPOINTS = 15


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
    |offset| in units of the group's largest scale, for formats that store it so. rounding: the format that the scales
    are put on, one by one, inside every round, as the paper does; None fits free scales.
    """
    if method == "greedy" and not offset and len(weights) <= _FEW_GROUPS:
        found, matrices = fit_sorted(weights, importance, bits, rounds, rounding)
        return GroupFit(found, None, matrices)
    pieces = max(1, _PIECE_WEIGHTS // weights.shape[1])
    scales, offsets, curvature = [], [], []
    for w, h in zip(weights.split(pieces), importance.split(pieces), strict=True):
        fit = _Piece(w, h, bits, offset, offset_limit, rounding).fit(method, rounds)
        columns, _ = _basis_and_error(w, h, fit)
        curvature.append(normal_equations(columns, h)[0])
        scales.append(fit.scales)
        if fit.offsets is not None:
            offsets.append(fit.offsets)
    return GroupFit(torch.cat(scales), torch.cat(offsets) if offsets else None, torch.cat(curvature))


class _Best:
    """The best fit seen so far, per group."""

    def __init__(self, groups: int, bits: int, offset: bool, like: Tensor) -> None:
        self.error = like.new_full((groups,), torch.inf)
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
    """Some groups and what binds their fit."""

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

    def fit(self, method: FitMethod, rounds: int) -> Scales:
        w, h, bits = self.w, self.h, self.bits
        if method == "uniform":
            return uniform_grid(w, h, bits, self.offset, self.limit)
        best = _Best(len(w), bits, self.offset, w)
        # To its end, so that a search is never worse than the greedy fit.
        self._alternate(greedy_start(w, h, bits), rounds, best)
        if method == "search":
            screening = min(rounds, _SCREENING_ROUNDS)
            for start in clipped_starts(w, h, bits, self.offset):
                self._alternate(start, screening, best)
            if rounds > screening:
                self._alternate(best.fit(), rounds - screening, best)
        return best.fit()

    def _alternate(self, start: Scales, rounds: int, best: _Best) -> None:
        """Offer the start, and the fit after each round, to `best`."""
        fit = self._admissible(start if self.offset else Scales(start.scales, None))
        columns, error = _basis_and_error(self.w, self.h, fit)
        best.offer(fit, error)
        for _ in range(rounds):
            last, fit = fit, self._admissible(self._solve(*normal_equations(columns, self.h)))
            if fit.equals(last):
                break
            columns, error = _basis_and_error(self.w, self.h, fit)
            best.offer(fit, error)

    def _admissible(self, fit: Scales) -> Scales:
        """The scales rounded, and the offset within its limit."""
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
        # On the bound the offset is a fixed multiple of the largest scale: its column joins the column of that plane.
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


def _basis_and_error(w: Tensor, h: Tensor, fit: Scales) -> tuple[Tensor, Tensor]:
    """Under nearest codes: signs of the planes, ones for the offset and last the weights, `[groups, terms + 1, size]`;
    error `[groups]`."""
    bits = fit.scales.shape[1]
    table = LevelTable.build(fit.scales, fit.offsets)
    rank, level = _nearest(table, w)
    codes = table.codes.T.gather(1, rank)
    shifts = torch.arange(bits, dtype=torch.uint8, device=w.device).view(1, bits, 1)
    columns = w.new_empty(len(w), bits + 1 + (fit.offsets is not None), w.shape[1])
    columns[:, :bits] = ((codes.unsqueeze(1) >> shifts) & 1).view(torch.int8).mul_(2).sub_(1)
    columns[:, bits:] = 1.0
    columns[:, -1] = w
    return columns, ((w - level).square() * h).sum(-1)


def normal_equations(columns: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares of the last of `columns` `[groups, terms + 1, size]` on the others: matrix
    `[groups, terms, terms]` and right-hand side `[groups, terms]`."""
    product = (columns[:, :-1] * h.unsqueeze(1)) @ columns.mT
    return product[..., :-1], product[..., -1]


def _nearest(table: LevelTable, w: Tensor) -> tuple[Tensor, Tensor]:
    """Rank and value of the nearest level for groups `[groups, size]` that share a table row each."""
    midpoints = table.midpoints.T.contiguous()
    if midpoints.shape[1] <= _COUNTED_MIDPOINTS:
        count = (w > midpoints[:, :1]).view(torch.uint8)
        for j in range(1, midpoints.shape[1]):
            count += (w > midpoints[:, j : j + 1]).view(torch.uint8)
        rank = count.long()
    else:
        rank = torch.searchsorted(midpoints, w)
    return rank, table.levels.T.gather(1, rank)
