"""A compressed matrix for the Triton kernels: views of the stored tensors, and two small tensors created at load.

See `triton_decode` for words and lanes. Large tensors (codes, scales) are not copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from shiftadd_cli.bcq.primitives.trellis.codes import CODES
from shiftadd_cli.bcq.scale_formats import scale_format
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight


@dataclass(frozen=True)
class TritonWeight:
    """The planes of one `[out, in]` matrix, without its rotation and outlier columns, if there are any.

    codes:     int32 or uint8 `[out · bits, words]`, a view of `weight_codes`
    scales:    uint8 `[out, bytes]` or float16 `[out, groups · planes]`, a view of `weight_exponents` or `weight_scales`
    offsets:   float16 `[out, groups]`, or float32 where float16 would round them, relative to the row scale; or None
    row_scale: float32 `[out]`
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    row_scale: Tensor
    columns: int
    # Stored and computed planes; more of the latter if planes are trellis-coded.
    bits: int
    planes: int
    # 4-bit fields per scale; 0 if scales are float16 numbers.
    nibbles: int
    groups: int
    # Words that share their scales; the last group may have fewer.
    group_words: int

    @property
    def taps(self) -> int:
        return register_taps(self.bits, self.planes)

    @property
    def words(self) -> int:
        return self.codes.shape[1]

    @property
    def lanes(self) -> int:
        """Columns per word."""
        return 8 * self.codes.itemsize


def supports(layout: PackedLayout) -> bool:
    """Whether the kernels can multiply by a matrix of this layout: planes in groups that do not span rows and that end
    at the end of a byte of the planes or at the end of the row."""
    grid = layout.grid
    ends = grid.group_columns % 8 == 0 or grid.column_groups == 1
    return layout.primitive.lookup_kernels and grid.group_rows == 1 and ends


def prepare(weight: QuantizedWeight) -> TritonWeight:
    """The tensors for the kernels, on the device of `weight`; `supports` must accept its layout."""
    layout, stored = weight.layout, weight.tensors
    grid, nibbles = layout.grid, scale_format(layout.scales.scale_format).nibbles
    codes = stored["weight_codes"].view(grid.rows * layout.bits, -1)
    single_group = grid.column_groups == 1
    if codes.shape[1] % 4 == 0 and (single_group or grid.group_columns % 32 == 0) and _begins_at_a_word(codes):
        codes = codes.view(torch.int32)
    row_scale = stored["weight_row_scale"].float()
    return TritonWeight(
        codes=codes,
        scales=stored["weight_exponents"] if nibbles else stored["weight_scales"].flatten(1),
        offsets=_offsets(weight),
        row_scale=row_scale.expand(grid.rows).contiguous(),
        columns=grid.columns,
        bits=layout.bits,
        planes=layout.planes,
        nibbles=nibbles,
        groups=grid.column_groups,
        group_words=codes.shape[1] if single_group else grid.group_columns // (8 * codes.itemsize),
    )


@cache
def register_taps(bits: int, planes: int) -> int:
    """The register masks of computed planes, at most six, by tap instead of by plane, see `triton_decode`; 0 if planes
    are stored as they are."""
    taps = 0
    if planes > bits:
        for plane, mask in enumerate(CODES[bits, planes].code.masks):
            taps |= sum(1 << (6 * tap + plane) for tap in range(mask.bit_length()) if mask >> tap & 1)
    return taps


def _begins_at_a_word(codes: Tensor) -> bool:
    """Whether a uint8 tensor is aligned to be read as int32: a slice of a tensor or of a file may begin anywhere."""
    return codes.storage_offset() % 4 == 0 and codes.data_ptr() % 4 == 0


def _offsets(weight: QuantizedWeight) -> Tensor | None:
    """`weight.offsets`, as float16 if that is exact (always, except for sums of three powers of two)."""
    if not weight.layout.scales.offset:
        return None
    wide = weight.offsets(weight.ratios())
    assert wide is not None
    narrow = wide.half()
    return narrow if torch.equal(narrow.float(), wide) else wide
