"""A weight matrix in compressed form, and its decoding.

    W[o, i] ≈ row_scale[o] · level[code[o, i]]

with the levels of the matrix's primitive, see `primitives`. With a rotation, this is the matrix for rotated inputs,
W R⁻¹ (see `rotation`). Outlier columns multiply the unrotated inputs and add to the product (see `outliers`).

Stored tensors (names are suffixes of the parameter `weight`):

    weight_codes      uint8    [out, bits, ceil(in / 8)]          bits of the codes, lowest first, see `packing`
    ...                                                           scales, see the module of the primitive
    weight_signs      uint8    [ceil(in / 8)]                     optional; diagonal of the rotation, packed as planes
    weight_columns    bfloat16 [out, K]                           optional; outlier columns
    weight_column_ids int32    [K]                                indices of their inputs, ascending
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shiftadd_cli.bcq.grid import Rows, ScaleGrid
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.outliers import outlier_count
from shiftadd_cli.bcq.packing import pack_planes, unpack_signs
from shiftadd_cli.bcq.primitives import PRIMITIVES
from shiftadd_cli.bcq.primitives.base import Primitive, Scales, TensorShapes
from shiftadd_cli.bcq.rotation import restore_weight

# Weights decoded at a time, so that the sum over the planes of a large matrix stays in the processor's cache.
_CACHED_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class PackedLayout:
    """A format for a matrix of `rows` outputs and `columns` inputs: it determines the shapes and dtypes of all stored
    tensors."""

    format: MatrixFormat
    rows: int
    columns: int

    @property
    def bits(self) -> int:
        """Bits of a weight's code."""
        return self.format.bits

    @cached_property
    def planes(self) -> int:
        """Number of computed planes, see `Primitive.planes`."""
        return self.primitive.planes(self.bits)

    @property
    def primitive(self) -> Primitive:
        """The primitive that represents weights by codes and scales."""
        return PRIMITIVES[self.format.primitive]

    @cached_property
    def scales(self) -> Scales:
        """The groups and the storage of their scales."""
        return self.primitive.scales(self.format, self.rows, self.columns)

    @property
    def grid(self) -> ScaleGrid:
        """Which weights share scales."""
        return self.scales.grid

    @property
    def rotation(self) -> bool:
        """Whether the matrix multiplies rotated inputs."""
        return self.format.rotation == "hadamard"

    @cached_property
    def outliers(self) -> int:
        """Number of outlier columns."""
        return outlier_count(self.columns, self.format.outlier_columns)

    def tensors(self) -> TensorShapes:
        """Shape and dtype of every stored tensor, by suffix."""
        column_bytes = -(-self.columns // 8)
        shapes: TensorShapes = {"weight_codes": ((self.rows, self.bits, column_bytes), torch.uint8)}
        shapes |= self.primitive.tensors(self.scales, self.bits)
        if self.rotation:
            shapes["weight_signs"] = ((column_bytes,), torch.uint8)
        if self.outliers:
            shapes["weight_columns"] = ((self.rows, self.outliers), torch.bfloat16)
            shapes["weight_column_ids"] = ((self.outliers,), torch.int32)
        return shapes

    @property
    def nbytes(self) -> int:
        """Bytes stored for the matrix, all tensors included."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.rows * self.columns)


@dataclass(frozen=True)
class QuantizedWeight:
    """A compressed `[out, in]` matrix: its layout and its stored tensors by suffix."""

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

        planes: stored bits, bool `[out, bits, in]`; ratios: float32 `[R, C, planes]`, ignored if groups have no scales;
        row_scale: `[out]` or `[1]`; offsets: float32 `[R, C]` relative to the row scale, or None; signs: ±1 `[in]` of
        the rotation, or None.
        """
        tensors = {"weight_codes": pack_planes(planes)}
        tensors |= layout.primitive.pack_scales(layout.scales, ratios, offsets)
        tensors["weight_row_scale"] = row_scale.to(torch.bfloat16)
        if signs is not None:
            tensors["weight_signs"] = pack_planes(signs > 0)
        return cls(layout, {name: tensor.contiguous() for name, tensor in tensors.items()})

    def ratios(self) -> Tensor:
        """Scales relative to the row scale, float32 `[R, C, planes]`, for a primitive whose groups have scales."""
        ratios = self.layout.primitive.ratios(self.layout.scales, self.layout.bits, self.tensors)
        assert ratios is not None, f"{self.layout.format.primitive} has no group scales"
        return ratios

    def offsets(self, ratios: Tensor) -> Tensor | None:
        """Offsets relative to the row scale: float32 `[R, C]`, or None; `ratios` is the result of `self.ratios()`."""
        return self.layout.primitive.offsets(self.layout.scales, self.tensors, ratios)

    def signs(self) -> Tensor | None:
        """The diagonal of the rotation, float32 `[in]` of ±1, or None."""
        stored = self.tensors.get("weight_signs")
        return None if stored is None else unpack_signs(stored, self.layout.columns)

    def outliers(self) -> tuple[Tensor, Tensor] | None:
        """Outlier columns and the indices of their inputs, bfloat16 `[out, K]` and int32 `[K]`, or None."""
        if not self.layout.outliers:
            return None
        return self.tensors["weight_columns"], self.tensors["weight_column_ids"]

    def with_outliers(self, columns: Tensor, ids: Tensor) -> QuantizedWeight:
        """The same planes with columns `[out, K]` for the inputs `ids` `[K]`, ascending; the layout includes them."""
        added = {"weight_columns": columns.to(torch.bfloat16), "weight_column_ids": ids.to(torch.int32)}
        return QuantizedWeight(self.layout, self.tensors | added)

    def decode(self) -> Tensor:
        """The decoded matrix, with the rotation undone: float32 `[out, in]`."""
        return self.completed(self.decode_stored())

    def decode_planes(self) -> Tensor:
        """`decode()` without the outlier columns."""
        signs, stored = self.signs(), self.decode_stored()
        return stored if signs is None else restore_weight(stored, signs)

    def decode_stored(self) -> Tensor:
        """The matrix of the planes, which multiplies (rotated) inputs: float32 `[out, in]`."""
        return next(self.tiles(self.layout.rows))[1]

    def gather(self, numbers: Tensor) -> Tensor:
        """The rows `numbers` `[...]` of `decode()`, float32 `[..., in]`, without decoding the others."""
        rows, layout = numbers.reshape(-1), self.layout
        out = torch.zeros(len(rows), layout.columns, device=numbers.device)
        layout.primitive.decoder(layout.scales, layout.bits, self.tensors)(rows, out)
        row_scale = self.tensors["weight_row_scale"].float()
        out.mul_(row_scale if row_scale.numel() == 1 else row_scale[rows].unsqueeze(-1))
        return self.completed(out, rows).view(*numbers.shape, layout.columns)

    def completed(self, stored: Tensor, rows: Rows = slice(None)) -> Tensor:
        """The same rows of `decode()` as `stored`, float32 `[n, in]`, has of `decode_stored()`; may change `stored`."""
        signs, outliers = self.signs(), self.outliers()
        decoded = stored if signs is None else restore_weight(stored, signs)
        if outliers is not None:
            columns, ids = outliers
            decoded.index_add_(1, ids, columns[rows].float())
        return decoded

    def tiles(self, height: int) -> Iterator[tuple[slice, Tensor]]:
        """`decode_stored()` in tiles of at most `height` rows: pairs of the slice of rows and its float32 `[rows, in]`.

        Besides the tile itself, only the scales of the whole matrix are in memory. Every tile is bit-identical to the
        same rows of the whole matrix.
        """
        layout, device = self.layout, self.tensors["weight_codes"].device
        decode = layout.primitive.decoder(layout.scales, layout.bits, self.tensors)
        row_scale = self.tensors["weight_row_scale"].float()
        step = max(1, _CACHED_WEIGHTS // layout.columns)
        for start in range(0, layout.rows, height):
            stop = min(start + height, layout.rows)
            tile = torch.zeros(stop - start, layout.columns, dtype=torch.float32, device=device)
            for first in range(start, stop, step):
                rows = slice(first, min(first + step, stop))
                part = tile[first - start : rows.stop - start]
                decode(rows, part)
                part.mul_(row_scale if row_scale.numel() == 1 else row_scale[rows].unsqueeze(-1))
            yield slice(start, stop), tile
