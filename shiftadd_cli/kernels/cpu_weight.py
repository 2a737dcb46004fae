"""A compressed matrix in the memory order of the CPU kernels, see native/layout.h."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from shiftadd_cli.bcq.packing import unpack_nibbles
from shiftadd_cli.bcq.scale_formats import scale_format
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.native.extension import cpu_extension

_BLOCK_ROWS = 32
# Even rows of a block come before odd ones in its scales and offsets.
_ROW_ORDER = [*range(0, _BLOCK_ROWS, 2), *range(1, _BLOCK_ROWS, 2)]
_HUGE_PAGE = 2 << 20
# Groups are padded to 16 columns, so narrower ones would be mostly padding.
_NARROWEST_GROUP = 16


@dataclass(frozen=True)
class CpuWeight:
    """The tensors for `ops.lookup_linear`; scales are either codes or numbers.

    Attributes:
        words: int32 `[entries]`, the stored planes.
        scale_codes: uint8, or None; scales: float32, or None: `[blocks, C, planes, 32]` with C groups of columns.
        offsets: float32 `[blocks, C, 32]`, or None.
        row_scale: float32 `[out]`.
        signs: float32 `[in]` of the rotation, or None.
    """

    words: Tensor
    scale_codes: Tensor | None
    scales: Tensor | None
    offsets: Tensor | None
    row_scale: Tensor
    signs: Tensor | None

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> CpuWeight:
        """Rearrange a matrix whose layout `supports` accepts; its tensors must be on the CPU."""
        grid, native = weight.layout.grid, native_form(weight.layout)
        words = _huge_pages(native.entries)
        codes = weight.tensors["weight_codes"].contiguous()
        _extension().pack(native, codes, words, torch.get_num_threads())
        ratios = weight.ratios()
        offsets = weight.offsets(ratios)
        scale_codes = _scale_codes(weight)
        return cls(
            words=words,
            scale_codes=None if scale_codes is None else _by_block(grid.expand_rows(scale_codes)),
            scales=_by_block(grid.expand_rows(ratios)) if scale_codes is None else None,
            offsets=None if offsets is None else _by_block(grid.expand_rows(offsets)),
            row_scale=weight.tensors["weight_row_scale"].float().expand(grid.rows).contiguous(),
            signs=weight.signs(),
        )

    def codes(self, layout: PackedLayout) -> Tensor:
        """The planes in stored form, uint8 `[out, bits, ceil(in / 8)]`; bits beyond the last column are 0."""
        shape, kind = layout.tensors()["weight_codes"]
        native = native_form(layout)
        codes = torch.empty(shape, dtype=kind, device="cpu")
        _extension().unpack(native, self.words, codes, torch.get_num_threads())
        return codes

    def tensors(self) -> dict[str, Tensor | None]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def supports(layout: PackedLayout) -> bool:
    """Whether the CPU kernels can multiply by a matrix of this layout."""
    grid = layout.grid
    return layout.primitive.lookup_kernels and grid.group_columns >= min(_NARROWEST_GROUP, grid.columns)


def native_form(layout: PackedLayout) -> Any:
    """The extension's own description of a layout."""
    grid = layout.grid
    return native_layout(grid.rows, grid.columns, grid.group_columns, layout.bits, layout.planes)


@cache
def native_layout(rows: int, columns: int, group_columns: int, bits: int, planes: int) -> Any:
    """The same from numbers; see native/layout.h."""
    return _extension().Layout(rows, columns, group_columns, bits, planes)


def _extension() -> Any:
    extension = cpu_extension()
    assert extension is not None, "callers check cpu_extension first"
    return extension


def _huge_pages(entries: int) -> Tensor:
    """Uninitialised int32 `[entries]`, on huge pages if it fills at least one."""
    if entries * 4 < _HUGE_PAGE:
        return torch.empty(entries, dtype=torch.int32, device="cpu")
    spare = _HUGE_PAGE // 4
    memory = torch.empty(entries + spare, dtype=torch.int32, device="cpu")
    start = -memory.data_ptr() % _HUGE_PAGE // 4
    words = memory[start : start + entries]
    # This must precede any write, because a page gets its size when it is first touched.
    _extension().advise_huge_pages(words)
    return words


def _scale_codes(weight: QuantizedWeight) -> Tensor | None:
    """Codes of scales with at most two terms, uint8 `[R, C, planes]`; None for other formats."""
    layout, nibbles = weight.layout, scale_format(weight.layout.scales.scale_format).nibbles
    if nibbles not in (1, 2):
        return None
    groups, planes = layout.grid.column_groups, layout.planes
    fields = unpack_nibbles(weight.tensors["weight_exponents"], groups * planes * nibbles)
    first, *rest = fields.view(-1, groups, planes, nibbles).unbind(-1)
    return first | rest[0] << 4 if rest else first


def _by_block(values: Tensor) -> Tensor:
    """`[out, ...]` → `[blocks, ..., 32]`, even rows first, missing rows as zeros."""
    missing = -values.shape[0] % _BLOCK_ROWS
    padded = pad(values, [0, 0] * (values.ndim - 1) + [0, missing])
    blocks = padded.view(-1, _BLOCK_ROWS, *values.shape[1:])[:, _ROW_ORDER]
    return blocks.movedim(1, -1).contiguous()
