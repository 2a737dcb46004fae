"""A weight matrix in its compressed form, and back.

    W[o, i] ≈ row_scale[o] · (Σ_b scale[o, g(i), b] · B_b[o, i]  +  offset[o, g(i)])

or, for a shift layer, W[o, i] ≈ row_scale[o] · level[code[o, i]] (see `shifts`).

With a rotation this is the matrix for rotated inputs, W R⁻¹ (see `rotation`). Outlier columns are added to what it
gives for the inputs themselves (see `outliers`).

Stored tensors (names are suffixes of the parameter `weight`; R and C count the groups along rows and columns):

    weight_codes      uint8    [out, bits, ceil(in / 8)]          planes, see `packing`; for shift layers the
                                                                  bits of the codes, lowest first
    weight_exponents  uint8    [R, ceil(C · bits · n / 2)]        scale codes of n nibbles, order (C, bits, n)
    weight_scales     float16  [R, C, bits]                       instead, for the scale format `float`
    weight_row_scale  bfloat16 [out] or [1]                       [1]: one power of two for the whole matrix
    weight_offset     uint8    [R, ceil(C / 2)]                   optional; nibbles, eighths of the largest scale
                      float16  [R, C]                             instead, for the scale format `float`
    weight_signs      uint8    [ceil(in / 8)]                     optional; diagonal of the rotation, packed as planes
    weight_columns    bfloat16 [out, K]                           optional; outlier columns
    weight_column_ids int32    [K]                                which inputs they are of, ascending

Shift layers have a row scale `[out]`, and no exponents, scales or offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.bcq.choices import Choice, Primitive, choice_of
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.outliers import outlier_count
from shiftadd_cli.bcq.packing import pack_nibbles, pack_planes, unpack_codes, unpack_nibbles, unpack_signs
from shiftadd_cli.bcq.rotation import restore_weight
from shiftadd_cli.bcq.scale_formats import (
    ScaleFormat,
    decode_offsets,
    encode_offsets,
    offset_multiples,
    scale_format,
)
from shiftadd_cli.bcq.shifts import shift_levels

# Weights decoded at a time, so that the planes of a large matrix meet in the processor's cache.
_CACHED_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class PackedLayout:
    """Everything that fixes the shapes and dtypes of a compressed matrix.

    A shift layer is one group of columns with a row scale, whose scale format is `none`.
    """

    grid: ScaleGrid
    bits: int
    scale_format: str
    row_scale: bool
    offset: bool
    rotation: bool = False
    outliers: int = 0
    primitive: Primitive = "bcq"

    @classmethod
    def resolve(
        cls,
        rows: int,
        columns: int,
        *,
        bits: int,
        group_size: int | str,
        group_rows: int | str,
        scale_format: str,
        row_scale: bool,
        offset: bool,
        rotation: str,
        outlier_columns: float = 0.0,
        primitive: Primitive = "bcq",
    ) -> PackedLayout:
        """The form of one `[rows, columns]` matrix under the fields of a recipe."""
        outliers, rotated = outlier_count(columns, outlier_columns), rotation == "hadamard"
        if primitive != "bcq":
            return cls(ScaleGrid(rows, columns, 1, columns), bits, "none", True, False, rotated, outliers, primitive)
        grid = ScaleGrid.resolve(rows, columns, group_rows, group_size)
        return cls(grid, bits, scale_format, row_scale, offset, rotated, outliers)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor, by suffix."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_codes": ((self.grid.rows, self.bits, -(-self.grid.columns // 8)), torch.uint8)
        }
        if self.primitive == "bcq":
            shapes |= self._scale_tensors()
        else:
            shapes["weight_row_scale"] = ((self.grid.rows,), torch.bfloat16)
        if self.rotation:
            shapes["weight_signs"] = ((-(-self.grid.columns // 8),), torch.uint8)
        if self.outliers:
            shapes["weight_columns"] = ((self.grid.rows, self.outliers), torch.bfloat16)
            shapes["weight_column_ids"] = ((self.outliers,), torch.int32)
        return shapes

    def _scale_tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, groups = self.grid.row_groups, self.grid.column_groups
        nibbles = scale_format(self.scale_format).nibbles
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if nibbles:
            shapes["weight_exponents"] = ((rows, -(-groups * self.bits * nibbles // 2)), torch.uint8)
        else:
            shapes["weight_scales"] = ((rows, groups, self.bits), torch.float16)
        shapes["weight_row_scale"] = ((self.grid.rows if self.row_scale else 1,), torch.bfloat16)
        if self.offset and nibbles:
            shapes["weight_offset"] = ((rows, -(-groups // 2)), torch.uint8)
        elif self.offset:
            shapes["weight_offset"] = ((rows, groups), torch.float16)
        return shapes

    @property
    def choice(self) -> Choice:
        """Primitive and bits in one."""
        return choice_of(self.primitive, self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes stored for the matrix, everything counted."""
        total = 0
        for shape, dtype in self.tensors().values():
            total += torch.Size(shape).numel() * dtype.itemsize
        return total

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.grid.rows * self.grid.columns)


@dataclass(frozen=True)
class QuantizedWeight:
    """A compressed `[out, in]` matrix: its layout and the stored tensors by suffix."""

    layout: PackedLayout
    tensors: dict[str, Tensor]

    @classmethod
    def pack(
        cls,
        layout: PackedLayout,
        planes: Tensor,
        ratios: Tensor,
        row_scale: Tensor,
        offsets: Tensor | None,
        signs: Tensor | None = None,
    ) -> QuantizedWeight:
        """Pack a solution whose scales already lie on the scale format.

        planes: bool `[out, bits, in]`; ratios: float32 `[R, C, bits]`, of no meaning for a shift layer; row_scale:
        `[out]` or `[1]`; offsets: float32 `[R, C]` relative to the row scale, or None; signs: ±1 `[in]` of the
        rotation, or None.
        """
        tensors = {"weight_codes": pack_planes(planes)}
        if layout.primitive == "bcq":
            tensors |= _pack_scales(scale_format(layout.scale_format), ratios, offsets)
        tensors["weight_row_scale"] = row_scale.to(torch.bfloat16)
        if signs is not None:
            tensors["weight_signs"] = pack_planes(signs > 0)
        return cls(layout, {name: tensor.contiguous() for name, tensor in tensors.items()})

    def ratios(self) -> Tensor:
        """Scales relative to the row scale: float32 `[R, C, bits]`; a shift layer has none."""
        grid, bits, form = self.layout.grid, self.layout.bits, scale_format(self.layout.scale_format)
        if not form.nibbles:
            return self.tensors["weight_scales"].float()
        count = grid.column_groups * bits * form.nibbles
        fields = unpack_nibbles(self.tensors["weight_exponents"], count).int()
        fields = fields.view(-1, grid.column_groups, bits, form.nibbles)
        shifts = 4 * torch.arange(form.nibbles, dtype=torch.int32, device=fields.device)
        return form.decode((fields << shifts).sum(-1))

    def offsets(self, ratios: Tensor) -> Tensor | None:
        """Offsets relative to the row scale: float32 `[R, C]`, or None; `ratios` as `self.ratios()` gives them."""
        stored = self.tensors.get("weight_offset")
        if stored is None:
            return None
        if stored.dtype == torch.float16:
            return stored.float()
        return decode_offsets(unpack_nibbles(stored, self.layout.grid.column_groups)) * ratios.amax(-1)

    def signs(self) -> Tensor | None:
        """The diagonal of the rotation, float32 `[in]` of ±1, or None."""
        stored = self.tensors.get("weight_signs")
        return None if stored is None else unpack_signs(stored, self.layout.grid.columns)

    def outliers(self) -> tuple[Tensor, Tensor] | None:
        """Outlier columns and the inputs they are of, bfloat16 `[out, K]` and int32 `[K]`, or None."""
        if not self.layout.outliers:
            return None
        return self.tensors["weight_columns"], self.tensors["weight_column_ids"]

    def with_outliers(self, columns: Tensor, ids: Tensor) -> QuantizedWeight:
        """The same planes beside columns `[out, K]` for the inputs `ids` `[K]`, ascending; the layout has room."""
        added = {"weight_columns": columns.to(torch.bfloat16), "weight_column_ids": ids.to(torch.int32)}
        return QuantizedWeight(self.layout, self.tensors | added)

    def decode(self) -> Tensor:
        """The matrix the stored tensors stand for, the rotation folded back: float32 `[out, in]`."""
        decoded = self.decode_planes()
        if (outliers := self.outliers()) is not None:
            columns, ids = outliers
            decoded.index_add_(1, ids, columns.float())
        return decoded

    def decode_planes(self) -> Tensor:
        """`decode()` without the outlier columns."""
        signs, stored = self.signs(), self.decode_stored()
        return stored if signs is None else restore_weight(stored, signs)

    def decode_stored(self) -> Tensor:
        """The matrix of the planes, which multiplies (rotated) inputs: float32 `[out, in]`."""
        return next(self.tiles(self.layout.grid.rows))[1]

    def tiles(self, height: int) -> Iterator[tuple[slice, Tensor]]:
        """`decode_stored()` in tiles of at most `height` rows: pairs of the slice of rows and its float32 `[rows, in]`.

        Beside the tile itself only the scales of the whole matrix are held. Every tile is bit-identical to the same
        rows of the whole.
        """
        grid, device = self.layout.grid, self.tensors["weight_codes"].device
        decode = self._plane_decoder() if self.layout.primitive == "bcq" else self._decode_shifts
        row_scale = self.tensors["weight_row_scale"].float()
        step = max(1, _CACHED_WEIGHTS // grid.columns)
        for start in range(0, grid.rows, height):
            stop = min(start + height, grid.rows)
            tile = torch.zeros(stop - start, grid.columns, dtype=torch.float32, device=device)
            for first in range(start, stop, step):
                rows = slice(first, min(first + step, stop))
                part = tile[first - start : rows.stop - start]
                decode(rows, part)
                part.mul_(row_scale if row_scale.numel() == 1 else row_scale[rows].unsqueeze(-1))
            yield slice(start, stop), tile

    def _plane_decoder(self) -> Callable[[slice, Tensor], None]:
        """Adds some rows, relative to the row scale, to zeros `[rows, in]`."""
        ratios, grid = self.ratios(), self.layout.grid
        offsets = self.offsets(ratios)
        by_plane = ratios.permute(2, 0, 1).contiguous()

        def decode(rows: slice, out: Tensor) -> None:
            codes = self.tensors["weight_codes"][rows]
            for plane, scales in enumerate(by_plane):
                signs = unpack_signs(codes[:, plane], grid.columns)
                _add_products(out, signs, grid.select_rows(scales, rows), grid.group_columns)
            if offsets is not None:
                out += grid.expand_columns(grid.select_rows(offsets, rows))

        return decode

    def _decode_shifts(self, rows: slice, out: Tensor) -> None:
        """The same for a shift layer."""
        levels = shift_levels(self.layout.primitive, self.layout.bits).to(out.device)
        codes = unpack_codes(self.tensors["weight_codes"][rows], self.layout.grid.columns)
        out.copy_(levels.index_select(0, codes.flatten()).view_as(out))


def _pack_scales(form: ScaleFormat, ratios: Tensor, offsets: Tensor | None) -> dict[str, Tensor]:
    """Scales and offsets as they are stored."""
    tensors = {}
    if form.nibbles:
        codes = form.encode(ratios).unsqueeze(-1)
        shifts = 4 * torch.arange(form.nibbles, dtype=torch.int32, device=codes.device)
        tensors["weight_exponents"] = pack_nibbles(((codes >> shifts) & 15).flatten(1))
    else:
        tensors["weight_scales"] = ratios.half()
    if offsets is not None and form.nibbles:
        tensors["weight_offset"] = pack_nibbles(encode_offsets(offset_multiples(offsets, ratios)))
    elif offsets is not None:
        tensors["weight_offset"] = offsets.half()
    return tensors


def _add_products(out: Tensor, signs: Tensor, scales: Tensor, width: int) -> None:
    """`out += signs · scales`, where `scales` `[rows, C]` holds one number for every `width` columns."""
    whole = out.shape[1] // width * width
    # Broadcasting over views of whole groups spares writing the scales out once per column.
    groups = out[:, :whole].unflatten(1, (-1, width))
    groups.addcmul_(signs[:, :whole].unflatten(1, (-1, width)), scales[:, : whole // width, None])
    if whole < out.shape[1]:
        out[:, whole:].addcmul_(signs[:, whole:], scales[:, -1:])
