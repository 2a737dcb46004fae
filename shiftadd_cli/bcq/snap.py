"""Move free scales onto a scale format: choose row scales, then scales and offsets jointly within each group.

For fixed signs, moving the scales of a group from their optimum x to x̂ costs (x̂ − x)ᵀ M (x̂ − x), where M is the
group's part of the normal equations. Rounding one scale at a time by distance ignores the off-diagonal of M; here each
scale is set in turn to the representable value nearest its optimum given the others, which is the exact minimum along
that coordinate. The row scale is searched over an octave by the same cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.bcq.scale_formats import OFFSET_STEP, ScaleFormat

_MANTISSAS = {"pot": 16, "apot2": 8, "apot3": 4}
_PASSES = 3


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

    def where(self, better: Tensor, other: SnappedScales) -> SnappedScales:
        """These scales in the rows where `better` bool `[R]` holds, the other's elsewhere."""
        offsets = None
        if self.offsets is not None and other.offsets is not None:
            offsets = torch.where(better.view(-1, 1), self.offsets, other.offsets)
        row_scale = self.row_scale
        if len(row_scale) > 1 or len(better) == 1:
            row_scale = torch.where(better, row_scale, other.row_scale)
        return SnappedScales(torch.where(better.view(-1, 1, 1), self.ratios, other.ratios), offsets, row_scale)


def matrix_scale(weights: Tensor) -> Tensor:
    """One power of two not below any weight, `[1]`: the row scale of a matrix that has none of its own."""
    largest = weights.abs().amax().clamp_min(2.0**-100)
    return torch.exp2(torch.ceil(torch.log2(largest))).view(1)


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
    bits + 1 when there are offsets (the offset last); fixed_row_scale: `[1]`, given when rows have no scale of their own.
    """
    target = scales if offsets is None else torch.cat((scales, offsets.unsqueeze(-1)), dim=-1)
    if fixed_row_scale is not None:
        row_scale = fixed_row_scale.expand(scales.shape[0])
    else:
        row_scale = _choose_row_scale(target, scales, curvature, form)
    snapped = _descend(target / row_scale.view(-1, 1, 1), curvature, form, scales.shape[-1], _PASSES)
    kept = row_scale if fixed_row_scale is None else fixed_row_scale
    return SnappedScales(
        snapped[..., : scales.shape[-1]].contiguous(),
        None if offsets is None else snapped[..., -1].contiguous(),
        kept,
    )


def _choose_row_scale(target: Tensor, scales: Tensor, curvature: Tensor, form: ScaleFormat) -> Tensor:
    """The row scale `[R]` with the least total cost over its row."""
    largest = scales.amax((1, 2)).clamp_min(2.0**-100)
    if not form.nibbles:
        return largest.bfloat16().float()
    steps = _MANTISSAS[form.name]
    best_cost, best = torch.full_like(largest, torch.inf), largest
    for step in range(steps):
        candidate = (largest * 2.0 ** (step / steps - 0.5)).bfloat16().float()
        ratio = target / candidate.view(-1, 1, 1)
        moved = _descend(ratio, curvature, form, scales.shape[-1], 1) - ratio
        cost = ((curvature @ moved.unsqueeze(-1)).squeeze(-1) * moved).sum((1, 2)) * candidate.square()
        better = cost < best_cost
        best_cost, best = torch.where(better, cost, best_cost), torch.where(better, candidate, best)
    return best


def _descend(ratio: Tensor, curvature: Tensor, form: ScaleFormat, bits: int, passes: int) -> Tensor:
    """Coordinate descent on representable values from the optimum `ratio` `[R, C, terms]`."""
    terms = ratio.shape[-1]
    if not form.nibbles:
        return torch.cat((form.round(ratio[..., :bits]), ratio[..., bits:].half().float()), dim=-1)
    diagonal = curvature.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(curvature.dtype).tiny)
    moved = torch.zeros_like(ratio)
    for _ in range(passes):
        for term in range(terms):
            pull = (curvature[..., term, :] * moved).sum(-1) - diagonal[..., term] * moved[..., term]
            goal = ratio[..., term] - pull / diagonal[..., term]
            if term < bits:
                value = form.round(goal)
            else:
                unit = (ratio[..., :bits] + moved[..., :bits]).amax(-1) * OFFSET_STEP
                multiple = torch.where(unit > 0, goal / unit, 0.0).round().clamp(-8, 7)
                value = multiple * unit
            moved[..., term] = value - ratio[..., term]
    # Subtracting and adding the optimum back may leave a value one rounding off the format.
    scales = form.round(ratio[..., :bits] + moved[..., :bits])
    if terms == bits:
        return scales
    unit = scales.amax(-1) * OFFSET_STEP
    multiple = torch.where(unit > 0, (ratio[..., bits] + moved[..., bits]) / unit, 0.0).round().clamp(-8, 7)
    return torch.cat((scales, (multiple * unit).unsqueeze(-1)), dim=-1)
