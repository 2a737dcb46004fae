"""Operations and bytes for multiplying one token by one matrix, in each way of computing it.

The counts cover operations on numbers, reads of the input and writes of the output in on-chip memory, and bytes of the
matrix read from DRAM, by the same rules for every way. Attention, norms, activation functions and the KV cache are not
counted, since they are equal in all ways. All experts of a mixture are assumed to be used.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from shiftadd_cli.bcq.primitives.base import Counts
from shiftadd_cli.bcq.rotation import rotation_block
from shiftadd_cli.bcq.weight import PackedLayout

Way = Literal["fp16", "int8", "int4", "additions", "look-ups"]

WAYS: dict[Way, str] = {
    "fp16": "dense, 16-bit floats",
    "int8": "8-bit integers, one scale a row",
    "int4": "4-bit integers, groups of 128",
    "additions": "planes, by additions and shifts",
    "look-ups": "planes, by tables of 4 inputs",
}

INT4_GROUP = 128


def dense(rows: int, columns: int) -> Counts:
    """Counts of y = W x with W in 16-bit floats."""
    counts = _traffic(rows, columns, 2 * rows * columns)
    counts.update(fp16_multiply=rows * columns, fp32_add=rows * columns)
    return counts


def int8(rows: int, columns: int) -> Counts:
    """Counts with W in 8-bit codes and one scale per row, on inputs rounded to 8 bits."""
    counts = _traffic(rows, columns, rows * columns + 2 * rows)
    counts.update(int8_multiply=rows * columns, int32_add=rows * columns, fp16_multiply=columns + rows)
    return counts


def int4(rows: int, columns: int) -> Counts:
    """Counts with W in 4-bit codes and a 16-bit scale for every 128 codes of a row, on inputs rounded to 8 bits."""
    groups = rows * -(-columns // INT4_GROUP)
    counts = _traffic(rows, columns, -(-rows * columns // 2) + 2 * groups)
    counts.update(int8_multiply=rows * columns, int32_add=rows * columns)
    counts.update(fp16_multiply=columns + groups, fp32_add=groups)
    return counts


def table_of_rows(rows: int, columns: int, nbytes: int) -> Counts:
    """Counts of y = W x with W in 8-bit rows, on inputs that are not rounded."""
    counts = _traffic(rows, columns, nbytes)
    counts.update(fp16_multiply=rows * columns + rows, fp32_add=rows * columns)
    return counts


def compressed(layout: PackedLayout, *, tables: bool) -> Counts:
    """Counts with W in compressed form.

    tables: for planes, look up the signed sums of 4 inputs instead of adding the inputs one by one.
    """
    rows, columns = layout.rows, layout.columns
    counts = _traffic(rows, columns, layout.nbytes)
    counts.update(layout.primitive.operations(layout.scales, layout.bits, tables=tables))
    # Row scales, rotation of the inputs, and outlier columns at 16 bits.
    if layout.scales.row_scale:
        counts.update(fp16_multiply=rows)
    else:
        counts.update(shift=rows)
    if layout.rotation:
        order = rotation_block(columns)
        counts.update(fp32_add=columns * (order.bit_length() - 1), shift=columns)
    counts.update(fp16_multiply=rows * layout.outliers, fp32_add=rows * layout.outliers)
    return counts


def _traffic(rows: int, columns: int, nbytes: int) -> Counts:
    counts: Counts = Counter()
    counts.update(sram_16_bits=rows + columns, dram_byte=nbytes)
    return counts
