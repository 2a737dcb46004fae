"""Operations and bytes of one token's way through one matrix, by the way it is computed.

Counted are the operations on numbers, the reads of the input and writes of the output in a memory on the chip, and the
bytes of the matrix that come from DRAM: the same for every way. Not counted, since they are the same too: attention,
norms, activation functions and the cache of keys and values. Of a mixture of experts all are taken to be used.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from shiftadd_cli.bcq.rotation import rotation_block
from shiftadd_cli.bcq.scale_formats import scale_format
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.report.unit_costs import Operation

Counts = Counter[Operation]
Way = Literal["fp16", "int8", "int4", "additions", "look-ups"]

WAYS: dict[Way, str] = {
    "fp16": "dense, 16-bit floats",
    "int8": "8-bit integers, one scale a row",
    "int4": "4-bit integers, groups of 128",
    "additions": "planes, by additions and shifts",
    "look-ups": "planes, by tables of 4 inputs",
}

INT4_GROUP = 128
TABLE_INPUTS = 4
# Of the 16 signed sums of 4 inputs, 8 are the negatives of the others. With a ± b and c ± d at hand, each takes one
# addition more.
_TABLE_ENTRIES = 8
_TABLE_ADDITIONS = 4 + _TABLE_ENTRIES


def dense(rows: int, columns: int) -> Counts:
    """y = W x with W in 16-bit floats."""
    counts = _traffic(rows, columns, 2 * rows * columns)
    counts.update(fp16_multiply=rows * columns, fp32_add=rows * columns)
    return counts


def int8(rows: int, columns: int) -> Counts:
    """The same with 8-bit codes and one scale a row, on inputs rounded to 8 bits."""
    counts = _traffic(rows, columns, rows * columns + 2 * rows)
    counts.update(int8_multiply=rows * columns, int32_add=rows * columns, fp16_multiply=columns + rows)
    return counts


def int4(rows: int, columns: int) -> Counts:
    """The same with 4-bit codes and a 16-bit scale for every 128 of a row."""
    groups = rows * -(-columns // INT4_GROUP)
    counts = _traffic(rows, columns, -(-rows * columns // 2) + 2 * groups)
    counts.update(int8_multiply=rows * columns, int32_add=rows * columns)
    counts.update(fp16_multiply=columns + groups, fp32_add=groups)
    return counts


def table_of_rows(rows: int, columns: int, nbytes: int) -> Counts:
    """y = W x with W in 8-bit rows, on inputs as they are."""
    counts = _traffic(rows, columns, nbytes)
    counts.update(fp16_multiply=rows * columns + rows, fp32_add=rows * columns)
    return counts


def planes(layout: PackedLayout, *, tables: bool) -> Counts:
    """The same with W in compressed form: each plane adds and subtracts inputs, and a scale shifts what it got.

    tables: look the signed sums of 4 inputs up, instead of adding one input after the other.
    """
    grid, bits = layout.grid, layout.bits
    rows, columns = grid.rows, grid.columns
    counts = _traffic(rows, columns, layout.nbytes)
    # Scales go to the sums of groups or, where many rows share them, to the inputs.
    inputs_are_scaled = grid.row_groups * columns < rows * grid.column_groups
    scaled = bits * (grid.row_groups * columns if inputs_are_scaled else rows * grid.column_groups)
    counts.update(_scaling(layout.scale_format, scaled))
    if tables:
        width = columns if inputs_are_scaled else grid.group_columns
        quads = -(-width // TABLE_INPUTS) * (1 if inputs_are_scaled else grid.column_groups)
        built = quads * (bits * grid.row_groups if inputs_are_scaled else 1)
        looked_up = rows * bits * quads
        counts.update(fp32_add=built * _TABLE_ADDITIONS + looked_up, sram_16_bits=built * _TABLE_ENTRIES + looked_up)
    else:
        counts.update(fp32_add=rows * columns * bits)
    if layout.offset:
        # A small integer times the sum of a group's inputs, which rows share, and then a scale.
        offsets = rows * grid.column_groups
        counts.update(fp32_add=columns, fp16_multiply=offsets)
        counts.update(_scaling(layout.scale_format, offsets))
    counts.update(_around(layout))
    return counts


def shifts(layout: PackedLayout) -> Counts:
    """The same with W as a shift layer: every weight shifts its input, or shifts it twice, and adds what it got."""
    rows, columns = layout.grid.rows, layout.grid.columns
    terms = rows * columns * (2 if layout.primitive == "shift2" else 1)
    counts = _traffic(rows, columns, layout.nbytes)
    counts.update(shift=terms, fp32_add=terms)
    counts.update(_around(layout))
    return counts


def _around(layout: PackedLayout) -> Counts:
    """Rotation of the inputs, scales of the rows, and columns at 16 bits."""
    rows, columns = layout.grid.rows, layout.grid.columns
    counts: Counts = Counter()
    if layout.row_scale:
        counts.update(fp16_multiply=rows)
    else:
        counts.update(shift=rows)
    if layout.rotation:
        order = rotation_block(columns)
        counts.update(fp32_add=columns * (order.bit_length() - 1), shift=columns)
    counts.update(fp16_multiply=rows * layout.outliers, fp32_add=rows * layout.outliers)
    return counts


def _scaling(name: str, times: int) -> Counts:
    """A scale is a sum of shifts, or a float, and what it gives is added up."""
    terms = scale_format(name).nibbles
    counts: Counts = Counter()
    if terms:
        counts.update(shift=terms * times, fp32_add=terms * times)
    else:
        counts.update(fp16_multiply=times, fp32_add=times)
    return counts


def _traffic(rows: int, columns: int, nbytes: int) -> Counts:
    counts: Counts = Counter()
    counts.update(sram_16_bits=rows + columns, dram_byte=nbytes)
    return counts
