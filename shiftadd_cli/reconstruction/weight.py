"""A differentiable compressed weight.

The stored values are discrete: codes, scales in their format, offsets in nibbles. Each has an underlying continuous
value. The forward pass rounds exactly as the stored form does, and the backward pass treats the rounding as the
identity (straight-through, Bengio et al. 2013, arXiv:1308.3432). The code is that of the level nearest to the latent
weight, so it changes when the latent weight crosses a midpoint (as in learned rounding, AdaRound, arXiv:2004.10568).

The codes of trellis-coded planes stay as they are. Changing one changes the rest of its path, of which the gradient of
a single weight knows nothing: blocks of SmolLM2 became worse than with tuned scales alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from shiftadd_cli.bcq.levels import planes_of, ranks_within
from shiftadd_cli.bcq.packing import unpack_codes, unpack_planes
from shiftadd_cli.bcq.rotation import restore_weight, rotate_weight
from shiftadd_cli.bcq.scale_formats import scale_format
from shiftadd_cli.bcq.weight import QuantizedWeight

# A latent weight starts this fraction of the way from its level to the original weight, clipped to its cell. Weights
# near a midpoint then change codes early and the others late, but none at the first step.
_TOWARDS_WEIGHT = 0.7


class TunableWeight(nn.Module):
    """`quantized`, whose groups lie in rows (`group_rows` 1), with parameters

    - `latent` float32 `[out, in]`, in the rotated basis, or None if codes stay as they are,
    - `row_scale` float32 `[out]`, absent if one power of two serves the whole matrix,
    - `ratios` float32 `[out, C, planes]` and `offsets` float32 `[out, C]`, relative to the row scale; None if groups
      have none,
    - `columns` float32 `[out, K]` or None, the outlier columns.

    weight: float32 `[out, in]`, the matrix that `quantized` approximates, in the basis of the layer's own input.
    """

    latent: nn.Parameter | None
    ratios: nn.Parameter | None
    offsets: nn.Parameter | None
    columns: nn.Parameter | None
    signs: Tensor | None
    ids: Tensor | None
    # Codes that stay, as stored, and the levels that they select, uint8 `[out, C, group]`.
    codes: Tensor | None
    labels: Tensor | None

    def __init__(self, quantized: QuantizedWeight, weight: Tensor) -> None:
        super().__init__()
        self.layout = quantized.layout
        self.register_buffer("signs", quantized.signs())
        ratios = self.layout.primitive.ratios(self.layout.scales, self.layout.bits, quantized.tensors)
        offsets = None if ratios is None else quantized.offsets(ratios)
        row_scale = quantized.tensors["weight_row_scale"].float()
        self.ratios = None if ratios is None else nn.Parameter(ratios)
        self.offsets = None if offsets is None else nn.Parameter(offsets)
        self.row_scale = nn.Parameter(row_scale, requires_grad=self.layout.scales.row_scale)
        outliers = quantized.outliers()
        self.columns = None if outliers is None else nn.Parameter(outliers[0].float())
        self.register_buffer("ids", None if outliers is None else outliers[1])
        codes = quantized.tensors["weight_codes"] if self.layout.primitive.stripe > 1 else None
        self.register_buffer("codes", codes)
        self.register_buffer("labels", None if codes is None else self._labels_of(codes))
        if codes is not None:
            self.latent = None
            return
        if outliers is not None:
            # The remainder, which the planes approximate.
            weight = weight.index_add(1, outliers[1], outliers[0].float(), alpha=-1)
        rotated = weight if self.signs is None else rotate_weight(weight, self.signs)
        self.latent = nn.Parameter(self._start(quantized.decode_stored(), rotated))

    def forward(self) -> Tensor:
        """The matrix after storing and decoding, float32 `[out, in]`."""
        levels = self._levels()
        values = self._ungroup(levels.gather(-1, self._labels(levels)))
        if self.latent is not None:
            values = values + (self.latent - self.latent.detach())
        values = values if self.signs is None else restore_weight(values, self.signs)
        if self.columns is None or self.ids is None:
            return values
        columns = _straight(self.columns, self.columns.detach().bfloat16().float())
        return values.index_add(1, self.ids, columns)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The compressed form of the current values."""
        if self.codes is not None:
            planes = unpack_planes(self.codes, self.layout.columns)
        else:
            planes = planes_of(self._ungroup(self._labels(self._levels())).to(torch.uint8), self.layout.bits)
        if self.ratios is None:
            nothing = self.row_scale.new_zeros(len(self.row_scale), 1, 0)
            packed = QuantizedWeight.pack(self.layout, planes, nothing, self._row_scale(), None, self.signs)
        else:
            ratios, offsets = self._snapped(self.ratios)
            packed = QuantizedWeight.pack(self.layout, planes, ratios, self._row_scale(), offsets, self.signs)
        if self.columns is None or self.ids is None:
            return packed
        return packed.with_outliers(self.columns, self.ids)

    def level_spacing(self) -> float:
        """Mean distance of neighbouring levels: the unit of the movement of latent weights."""
        levels = self._levels().detach()
        spread = levels.amax(-1) - levels.amin(-1)
        return float(spread.mean()) / (levels.shape[-1] - 1)

    def _start(self, values: Tensor, target: Tensor) -> Tensor:
        """Latent weights `[out, in]`: between the current values and the target, inside the cells of the values."""
        ratios, offsets = (None if free is None else free.detach() for free in (self.ratios, self.offsets))
        levels = self.layout.primitive.levels(self.layout.bits, ratios, offsets).to(values.device)
        levels = levels.sort(dim=-1, stable=True).values.expand(len(values), -1, -1)
        midpoints = (levels[..., 1:] + levels[..., :-1]) / 2 * self.row_scale.detach().view(-1, 1, 1)
        ends = midpoints.new_full((*midpoints.shape[:-1], 1), torch.inf)
        rank = ranks_within(self._group(values), midpoints)
        low = torch.cat((-ends, midpoints), dim=-1).gather(-1, rank)
        high = torch.cat((midpoints, ends), dim=-1).gather(-1, rank)
        inside = self._ungroup(torch.minimum(torch.maximum(self._group(target), low), high))
        return values + _TOWARDS_WEIGHT * (inside - values)

    def _row_scale(self) -> Tensor:
        """The row scale as stored, with a straight-through gradient."""
        return _straight(self.row_scale, self.row_scale.detach().bfloat16().float())

    def _snapped(self, free: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ratios `free` and the offsets as stored, with straight-through gradients."""
        form = scale_format(self.layout.scales.scale_format)
        ratios = _straight(free, form.round(free.detach()))
        if self.offsets is None:
            return ratios, None
        return ratios, _straight(self.offsets, form.round_offsets(self.offsets.detach(), ratios.detach()))

    def _levels(self) -> Tensor:
        """All levels: `[out, C, 2 ** planes]`."""
        row_scale = self._row_scale().view(-1, 1, 1)
        ratios, offsets = (None, None) if self.ratios is None else self._snapped(self.ratios)
        return self.layout.primitive.levels(self.layout.bits, ratios, offsets).to(row_scale) * row_scale

    def _labels_of(self, codes: Tensor) -> Tensor:
        """The numbers of the levels that stored codes select, uint8 `[out, C, group]`."""
        planes = self.layout.primitive.packed_planes(codes, slice(0, self.layout.rows), self.layout.bits)
        return self._group(unpack_codes(planes, self.layout.columns).to(torch.uint8))

    @torch.no_grad()
    def _labels(self, levels: Tensor) -> Tensor:
        """The numbers of the levels that the weights take, int64 `[out, C, group]`."""
        if self.latent is None:
            assert self.labels is not None
            return self.labels.long()
        ordered, order = levels.expand(len(self.latent), -1, -1).sort(dim=-1, stable=True)
        midpoints = (ordered[..., 1:] + ordered[..., :-1]) / 2
        return order.gather(-1, ranks_within(self._group(self.latent), midpoints))

    def _group(self, matrix: Tensor) -> Tensor:
        """Reshape `[out, in]` to `[out, C, group]`, padded."""
        grid = self.layout.grid
        padding = grid.column_groups * grid.group_columns - grid.columns
        return pad(matrix, (0, padding)).view(grid.rows, grid.column_groups, grid.group_columns)

    def _ungroup(self, groups: Tensor) -> Tensor:
        return groups.flatten(1)[:, : self.layout.grid.columns]


def _straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    return value + (rounded - value.detach())
