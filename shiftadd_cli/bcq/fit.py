"""Fit the scales of each group by itself: alternating least squares from one or several starts.

Binary-coding quantization of a group w: minimise Σ_k h_k (w_k − z − Σ_b α_b B_bk)² over signs B, scales α ≥ 0 and,
optionally, an offset z. Alternating least squares and nearest level is the method of LUT-GEMM (section 3) and
ShiftAddLLM (section 3); it falls into poor minima from the greedy start alone once q ≥ 3, so `search` also starts
from uniform grids clipped at several widths and keeps the best start per group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import LevelTable
from shiftadd_cli.bcq.linalg import solve_small

FitMethod = Literal["search", "greedy", "uniform"]

_CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)
_ASYMMETRIC_CLIPS = (1.0, 0.8, 0.6)
_SCREENING_ROUNDS = 2
# Groups are handled in pieces whose temporaries stay in the second-level cache.
_PIECE_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class GroupFit:
    """Scales `[groups, bits]` ≥ 0, offsets `[groups]` or None, and the normal matrix of each group under its nearest
    codes, `[groups, terms, terms]` with terms = bits, plus one for the offset."""

    scales: Tensor
    offsets: Tensor | None
    curvature: Tensor


def fit_groups(
    weights: Tensor,
    importance: Tensor,
    bits: int,
    *,
    method: FitMethod = "search",
    rounds: int = 4,
    offset: bool = False,
    rounding: Callable[[Tensor], Tensor] | None = None,
) -> GroupFit:
    """Fit every group of weights.

    weights: float32 `[groups, size]`. importance: h ≥ 0, `[groups, size]` (zero for padding). rounding: applied to the
    scales inside every round, as the paper does; None fits free scales.
    """
    pieces = max(1, _PIECE_WEIGHTS // weights.shape[1])
    scales, offsets, curvature = [], [], []
    for w, h in zip(weights.split(pieces), importance.split(pieces), strict=True):
        fit = _fit_piece(w, h, bits, method, rounds, offset, rounding)
        basis, _ = _basis_and_error(w, h, fit)
        curvature.append(normal_equations(basis, w, h)[0])
        scales.append(fit.scales)
        if fit.offsets is not None:
            offsets.append(fit.offsets)
    return GroupFit(torch.cat(scales), torch.cat(offsets) if offsets else None, torch.cat(curvature))


def _fit_piece(
    w: Tensor,
    h: Tensor,
    bits: int,
    method: FitMethod,
    rounds: int,
    offset: bool,
    rounding: Callable[[Tensor], Tensor] | None,
) -> _Scales:
    if method == "uniform":
        return _uniform(w, h, bits, offset)
    starts = [_greedy(w, h, bits)]
    if method == "search":
        starts += _clipped(w, h, bits, offset)
    screening = rounds if len(starts) == 1 else min(rounds, _SCREENING_ROUNDS)
    best = _Best(len(w), bits, offset, w)
    for start in starts:
        _alternate(w, h, start, screening, rounding, best)
    if rounds > screening:
        _alternate(w, h, best.fit(), rounds - screening, rounding, best)
    return best.fit()


@dataclass(frozen=True)
class _Scales:
    """Scales `[groups, bits]` and offsets `[groups]` or None, before the curvature is known."""

    scales: Tensor
    offsets: Tensor | None


class _Best:
    """The best fit seen so far, per group."""

    def __init__(self, groups: int, bits: int, offset: bool, like: Tensor) -> None:
        self.error = like.new_full((groups,), torch.inf)
        self.scales = like.new_zeros(groups, bits)
        self.offsets = like.new_zeros(groups) if offset else None

    def offer(self, fit: _Scales, error: Tensor) -> None:
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scales = torch.where(better.unsqueeze(-1), fit.scales, self.scales)
        if self.offsets is not None and fit.offsets is not None:
            self.offsets = torch.where(better, fit.offsets, self.offsets)

    def fit(self) -> _Scales:
        return _Scales(self.scales, self.offsets)


def _alternate(
    w: Tensor, h: Tensor, start: _Scales, rounds: int, rounding: Callable[[Tensor], Tensor] | None, best: _Best
) -> None:
    """Offer the start, and the fit after each round, to `best`."""
    bits = best.scales.shape[1]
    fit = start if best.offsets is not None else _Scales(start.scales, None)
    for turn in range(rounds + 1):
        if rounding is not None:
            fit = _Scales(rounding(fit.scales), fit.offsets)
        basis, error = _basis_and_error(w, h, fit)
        best.offer(fit, error)
        if turn < rounds:
            solution = solve_small(*normal_equations(basis, w, h))
            fit = _Scales(solution[:, :bits].abs(), None if fit.offsets is None else solution[:, bits])


def _basis_and_error(w: Tensor, h: Tensor, fit: _Scales) -> tuple[Tensor, Tensor]:
    """Under nearest codes: signs of the planes, and ones for the offset, `[groups, terms, size]`; error `[groups]`."""
    bits = fit.scales.shape[1]
    table = LevelTable.build(fit.scales, fit.offsets)
    rank, level = _nearest(table, w)
    codes = table.codes.T.gather(1, rank)
    shifts = torch.arange(bits, dtype=torch.uint8, device=w.device).view(1, bits, 1)
    basis = ((codes.unsqueeze(1) >> shifts) & 1).to(w.dtype).mul_(2).sub_(1)
    if fit.offsets is not None:
        basis = torch.cat((basis, torch.ones_like(basis[:, :1])), dim=1)
    return basis, ((w - level).square() * h).sum(-1)


def normal_equations(basis: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares of `w` `[groups, size]` on `basis` `[groups, terms, size]`: matrix and right-hand side."""
    weighted = basis * h.unsqueeze(1)
    return weighted @ basis.mT, (weighted @ w.unsqueeze(-1)).squeeze(-1)


def _nearest(table: LevelTable, w: Tensor) -> tuple[Tensor, Tensor]:
    """Rank and value of the nearest level for groups `[groups, size]` that share a table row each."""
    midpoints = table.midpoints.T.contiguous()
    if midpoints.shape[1] < 16:
        rank = torch.zeros_like(w, dtype=torch.int64)
        for j in range(midpoints.shape[1]):
            rank += w > midpoints[:, j : j + 1]
    else:
        rank = torch.searchsorted(midpoints, w)
    return rank, table.levels.T.gather(1, rank)


def _greedy(w: Tensor, h: Tensor, bits: int) -> _Scales:
    """Residual by residual: α = weighted mean of |r|, r ← r − α sign(r) (the start of the paper)."""
    total = h.sum(-1).clamp_min(torch.finfo(h.dtype).tiny)
    residual, scales = w, []
    for _ in range(bits):
        alpha = (residual.abs() * h).sum(-1) / total
        residual = residual - alpha.unsqueeze(-1) * torch.where(residual >= 0, 1.0, -1.0)
        scales.append(alpha)
    return _Scales(torch.stack(scales, dim=-1), torch.zeros_like(total))


def _range(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group; padding, which has no importance, counts as zero weight."""
    kept = torch.where(h > 0, w, 0.0)
    return kept.amin(-1), kept.amax(-1)


def _clipped(w: Tensor, h: Tensor, bits: int, offset: bool) -> list[_Scales]:
    """Uniform grids over a part of the range, symmetric and, with an offset, around the middle of the range."""
    low, high = _range(w, h)
    powers = torch.exp2(torch.arange(bits, device=w.device, dtype=w.dtype)) / (2**bits - 1)
    reach = torch.maximum(high, -low)
    fits = [_Scales(clip * reach.unsqueeze(-1) * powers, torch.zeros_like(low)) for clip in _CLIPS]
    if offset:
        half, middle = (high - low) / 2, (high + low) / 2
        fits += [_Scales(clip * half.unsqueeze(-1) * powers, middle) for clip in _ASYMMETRIC_CLIPS]
    return fits


def _uniform(w: Tensor, h: Tensor, bits: int, offset: bool) -> _Scales:
    """The round-to-nearest grid: step = range / (2^q − 1), with an integer zero point when there is an offset."""
    low, high = _range(w, h)
    top = 2**bits - 1
    planes = torch.exp2(torch.arange(bits, device=w.device, dtype=w.dtype) - 1)
    if not offset:
        step = 2 * torch.maximum(high, -low) / top
        return _Scales(step.unsqueeze(-1) * planes, None)
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = (high - low) / top
    zero_point = torch.where(step > 0, -low / step, 0.0).round()
    return _Scales(step.unsqueeze(-1) * planes, step * (top / 2 - zero_point))
