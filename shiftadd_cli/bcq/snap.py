"""Move free scales onto a scale format: choose row scales, then scales and offsets jointly within each group.

For fixed signs, moving the scales of a group from their optimum x to x̂ costs (x̂ − x)ᵀ M (x̂ − x), where M is the
group's part of the normal equations. Rounding one scale at a time by distance ignores the off-diagonal of M. Here each
scale in turn takes the representable value nearest to its optimum given the others, which is the exact minimum along
that coordinate. The result never costs more than rounding each scale independently. The row scale is searched over an
octave with the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.bcq.scale_formats import ScaleFormat

_MANTISSAS = {"pot": 16, "apot2": 8, "apot3": 4}
# Enough to converge; two or three are usual.
_PASSES = 10


@dataclass(frozen=True)
class SnappedScales:
    """Scales on the format: `ratios` float32 `[R, C, bits]`, `offsets` float32 `[R, C]` or None (both relative to the
    row scale), `row_scale` float32 `[R]` or `[1]`, exactly representable in bfloat16."""

    ratios: Tensor
    offsets: Tensor | None
    row_scale: Tensor

    def scales(self) -> Tensor:
        """Scales `[R, C, bits]` in the units of the weights."""
        return self.ratios * self.row_scale.view(-1, 1, 1)

    def offset_values(self) -> Tensor | None:
        """Offsets `[R, C]` in the units of the weights."""
        return None if self.offsets is None else self.offsets * self.row_scale.view(-1, 1)

    @classmethod
    def concatenate(cls, parts: Sequence[SnappedScales]) -> SnappedScales:
        """The scales of vertically stacked matrices whose rows have scales of their own."""
        offsets = [part.offsets for part in parts if part.offsets is not None]
        return cls(
            torch.cat([part.ratios for part in parts]),
            torch.cat(offsets) if offsets else None,
            torch.cat([part.row_scale for part in parts]),
        )

    def split(self, heights: Sequence[int]) -> list[SnappedScales]:
        """The inverse of `concatenate`."""
        sizes = list(heights)
        ratios, row_scales = self.ratios.split(sizes), self.row_scale.split(sizes)
        offsets = [None] * len(sizes) if self.offsets is None else self.offsets.split(sizes)
        return [SnappedScales(*part) for part in zip(ratios, offsets, row_scales, strict=True)]

    def where(self, better: Tensor, other: SnappedScales) -> SnappedScales:
        """These scales in the rows where `better` bool `[R]` is true, those of `other` elsewhere."""
        offsets = None
        if self.offsets is not None and other.offsets is not None:
            offsets = torch.where(better.view(-1, 1), self.offsets, other.offsets)
        row_scale = self.row_scale
        if len(row_scale) > 1 or len(better) == 1:
            row_scale = torch.where(better, row_scale, other.row_scale)
        return SnappedScales(torch.where(better.view(-1, 1, 1), self.ratios, other.ratios), offsets, row_scale)


def matrix_scale(weights: Tensor) -> Tensor:
    """A power of two not below any weight, `[1]`: the row scale of a matrix that stores none per row."""
    mantissa, exponent = torch.frexp(weights.abs().amax().clamp_min(2.0**-100))
    # frexp gives mantissas from 1/2 up, so a power of two is its own bound.
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int()).view(1)


def snap_scales(
    scales: Tensor,
    offsets: Tensor | None,
    curvature: Tensor,
    form: ScaleFormat,
    *,
    fixed_row_scale: Tensor | None = None,
) -> SnappedScales:
    """Put free scales on the format.

    scales: `[R, C, bits]` ≥ 0; offsets: `[R, C]` or None; curvature: M, `[R, C, terms, terms]` with terms = bits, or
    bits + 1 with offsets (the offset last); fixed_row_scale: `[1]` or `[R]`, or None to choose the row scale here.
    """
    target = scales if offsets is None else torch.cat((scales, offsets.unsqueeze(-1)), dim=-1)
    if fixed_row_scale is not None:
        row_scale = fixed_row_scale.expand(scales.shape[0])
    else:
        row_scale = _choose_row_scale(target, scales, curvature, form)
    snapped = _descend(target / row_scale.view(-1, 1, 1), curvature, form, scales.shape[-1])
    stored_row_scale = row_scale if fixed_row_scale is None else fixed_row_scale
    return SnappedScales(
        snapped[..., : scales.shape[-1]].contiguous(),
        None if offsets is None else snapped[..., -1].contiguous(),
        stored_row_scale,
    )


def _choose_row_scale(target: Tensor, scales: Tensor, curvature: Tensor, form: ScaleFormat) -> Tensor:
    """The row scale `[R]` with the lowest total cost over its row."""
    largest = scales.amax((1, 2)).clamp_min(2.0**-100)
    best = largest.bfloat16().float()
    if not form.nibbles:
        return best
    steps = _MANTISSAS[form.name]
    best_cost = torch.full_like(largest, torch.inf)
    for step in range(steps):
        candidate = (largest * 2.0 ** (step / steps - 0.5)).bfloat16().float()
        ratio = target / candidate.view(-1, 1, 1)
        value = _sweep(ratio, ratio, curvature, form, scales.shape[-1])
        cost = _cost(value - ratio, curvature).sum(1) * candidate.square()
        better = cost < best_cost
        best_cost, best = torch.where(better, cost, best_cost), torch.where(better, candidate, best)
    return best


def _cost(moved: Tensor, curvature: Tensor) -> Tensor:
    """Cost `[...]` of moving the terms of every group by `moved` `[..., terms]`."""
    return ((curvature @ moved.unsqueeze(-1)).squeeze(-1) * moved).sum(-1)


def _descend(ratio: Tensor, curvature: Tensor, form: ScaleFormat, bits: int) -> Tensor:
    """Representable values near the optimum `ratio` `[R, C, terms]`, by coordinate descent from two starts: the optimum
    itself, and its terms rounded independently. Each group takes the cheapest values that the descent visits."""
    if not form.nibbles:
        return _rounded(ratio, form, bits)
    shape = ratio.shape
    ratio, curvature = ratio.flatten(0, 1), curvature.flatten(0, 1)
    rounded = _rounded(ratio, form, bits)
    best, best_cost = rounded.clone(), _cost(rounded - ratio, curvature)
    # Scales rounded in every round of their fit are on the format already, and not moving is always cheapest.
    moved = (rounded != ratio).any(-1).nonzero().squeeze(-1)
    for start in (ratio, rounded):
        value = start.clone()
        active = moved
        for _ in range(_PASSES):
            if not len(active):
                break
            last = value[active]
            new = _sweep(ratio[active], last, curvature[active], form, bits)
            value[active] = new
            active, new = active[(new != last).any(-1)], new[(new != last).any(-1)]
            cost = _cost(new - ratio[active], curvature[active])
            better = cost < best_cost[active]
            best_cost[active[better]] = cost[better]
            best[active[better]] = new[better]
    return best.view(shape)


def _sweep(ratio: Tensor, value: Tensor, curvature: Tensor, form: ScaleFormat, bits: int) -> Tensor:
    """One pass of coordinate descent from `value` that makes every term representable, the offset last."""
    value, moved = value.clone(), value - ratio
    diagonal = curvature.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(curvature.dtype).tiny)
    for term in range(ratio.shape[-1]):
        pull = (curvature[..., term, :] * moved).sum(-1) - diagonal[..., term] * moved[..., term]
        goal = ratio[..., term] - pull / diagonal[..., term]
        value[..., term] = form.round(goal) if term < bits else form.round_offsets(goal, value[..., :bits])
        moved[..., term] = value[..., term] - ratio[..., term]
    return value


def _rounded(ratio: Tensor, form: ScaleFormat, bits: int) -> Tensor:
    """Every term rounded independently."""
    scales = form.round(ratio[..., :bits])
    if ratio.shape[-1] == bits:
        return scales
    return torch.cat((scales, form.round_offsets(ratio[..., bits], scales).unsqueeze(-1)), dim=-1)
