"""Starting points for the fit of a group: greedy residuals, and uniform grids over parts of the range.

Groups are rows of `w` `[groups, size]`, with importance `h` of the same shape, zero for padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)
_ASYMMETRIC_CLIPS = (1.0, 0.8, 0.6)


@dataclass(frozen=True)
class Scales:
    """Scales `[groups, bits]` and offsets `[groups]` or None, before the curvature is known."""

    scales: Tensor
    offsets: Tensor | None

    def equals(self, other: Scales) -> bool:
        same = torch.equal(self.scales, other.scales)
        if self.offsets is None or other.offsets is None:
            return same
        return same and torch.equal(self.offsets, other.offsets)


def greedy_start(w: Tensor, h: Tensor, bits: int) -> Scales:
    """One residual after another: α = weighted mean of |r|, r ← r − α sign(r) (the paper's start)."""
    total = h.sum(-1).clamp_min(torch.finfo(h.dtype).tiny)
    residual, scales = w, []
    for _ in range(bits):
        alpha = (residual.abs() * h).sum(-1) / total
        residual = residual - alpha.unsqueeze(-1) * torch.where(residual >= 0, 1.0, -1.0)
        scales.append(alpha)
    return Scales(torch.stack(scales, dim=-1), torch.zeros_like(total))


def _range(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight with importance in each group; zero if there is none."""
    low = torch.where(h > 0, w, torch.inf).amin(-1)
    high = torch.where(h > 0, w, -torch.inf).amax(-1)
    nonempty = low <= high
    return torch.where(nonempty, low, 0.0), torch.where(nonempty, high, 0.0)


def clipped_starts(w: Tensor, h: Tensor, bits: int, offset: bool) -> list[Scales]:
    """Uniform grids over parts of the range, symmetric and, with an offset, around the middle of the range."""
    low, high = _range(w, h)
    powers = torch.exp2(torch.arange(bits, device=w.device, dtype=w.dtype)) / (2**bits - 1)
    reach = torch.maximum(high, -low)
    fits = [Scales(clip * reach.unsqueeze(-1) * powers, torch.zeros_like(low)) for clip in _CLIPS]
    if offset:
        half, middle = (high - low) / 2, (high + low) / 2
        fits += [Scales(clip * half.unsqueeze(-1) * powers, middle) for clip in _ASYMMETRIC_CLIPS]
    return fits


def uniform_grid(w: Tensor, h: Tensor, bits: int, offset: bool, limit: float) -> Scales:
    """The round-to-nearest grid: step = range / (2^q − 1), with an integer zero point when there is an offset.

    If the offset limit forbids that zero point, the grid takes the nearest allowed one (which need not be an integer)
    and the smallest step that still covers the range.
    """
    low, high = _range(w, h)
    top = 2**bits - 1
    planes = torch.exp2(torch.arange(bits, device=w.device, dtype=w.dtype) - 1)
    if not offset:
        step = 2 * torch.maximum(high, -low) / top
        return Scales(step.unsqueeze(-1) * planes, None)
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = (high - low) / top
    zero_point = torch.where(step > 0, -low / step, 0.0).round()
    reach = limit * 2.0 ** (bits - 2)
    if reach < top / 2:
        allowed = zero_point.clamp(top / 2 - reach, top / 2 + reach)
        covering = torch.maximum(high / (top - allowed), -low / allowed)
        step = torch.where(allowed == zero_point, step, covering)
        zero_point = allowed
    return Scales(step.unsqueeze(-1) * planes, step * (top / 2 - zero_point))
