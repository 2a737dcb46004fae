"""Operation counts, compared with a machine that counts each operation as it computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from artifacts import random_weight
from formats import matrix_format

from shiftadd_cli.bcq.packing import unpack_signs
from shiftadd_cli.bcq.primitives.base import Operation
from shiftadd_cli.bcq.primitives.trellis.codes import CODES
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.report import operations


def layout_of(rows: int, columns: int, **fields: Any) -> PackedLayout:
    common: dict[str, Any] = {"bits": 2, "group_size": 8, "row_scale": False}
    return PackedLayout(matrix_format(**(common | fields)), rows, columns)


class Machine:
    """Adds, shifts, multiplies and looks up numbers, and counts these operations."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, one: float, other: float) -> float:
        self.counts["fp32_add"] += 1
        return one + other

    def shift(self, number: float, power: float) -> float:
        self.counts["shift"] += 1
        return number * power

    def multiply(self, one: float, other: float) -> float:
        self.counts["fp16_multiply"] += 1
        return one * other

    def look_up(self, table: dict[tuple[float, ...], float], signs: tuple[float, ...]) -> float:
        self.counts["sram_16_bits"] += 1
        if signs in table:
            return table[signs]
        return -table[tuple(-sign for sign in signs)]

    def make_table(self, inputs: list[float]) -> dict[tuple[float, ...], float]:
        """Signed sums of 4 inputs with a plus first; every entry is counted as it is written."""
        a, b, c, d = inputs
        table: dict[tuple[float, ...], float] = {}
        halves = [(s, self.add(a, s * b)) for s in (1.0, -1.0)]
        others = [(s, self.add(c, s * d)) for s in (1.0, -1.0)]
        for second, left in halves:
            for fourth, right in others:
                for third in (1.0, -1.0):
                    table[(1.0, second, third, third * fourth)] = self.add(left, third * right)
                    self.counts["sram_16_bits"] += 1
        return table


def by_machine(layout: PackedLayout, *, tables: bool) -> tuple[Machine, torch.Tensor, torch.Tensor]:
    """A machine, its outputs and the expected ones, for groups along rows whose widths are multiples of four."""
    weight, machine, grid = random_weight(layout), Machine(), layout.grid
    x = torch.randn(grid.columns, dtype=torch.float64).tolist()
    planes = unpack_signs(weight.tensors["weight_codes"], grid.columns)
    ratios = weight.ratios()
    machine.counts["sram_16_bits"] += grid.columns + grid.rows
    machine.counts["dram_byte"] += layout.nbytes
    sums = [machine.make_table(x[start : start + 4]) for start in range(0, grid.columns, 4)] if tables else []
    outputs = []
    for row in range(grid.rows):
        total = 0.0
        for group in range(grid.column_groups):
            for plane in range(layout.bits):
                signs = planes[row, plane].tolist()
                part = 0.0
                columns = range(group * grid.group_columns, (group + 1) * grid.group_columns)
                if tables:
                    for start in columns[::4]:
                        part = machine.add(part, machine.look_up(sums[start // 4], tuple(signs[start : start + 4])))
                else:
                    for column in columns:
                        part = machine.add(part, signs[column] * x[column])
                # Each of the two terms of a scale shifts the sum, which is added to the output. Any split is right.
                scale = float(ratios[row, group, plane])
                for term in (scale / 2, scale / 2):
                    total = machine.add(total, machine.shift(part, term))
        factor = float(weight.tensors["weight_row_scale"].flatten()[row if layout.scales.row_scale else 0])
        outputs.append(machine.multiply(total, factor) if layout.scales.row_scale else machine.shift(total, factor))
    expected = weight.decode().double() @ torch.tensor(x, dtype=torch.float64)
    return machine, torch.tensor(outputs, dtype=torch.float64), expected


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("row_scale", [False, True])
def test_counts_of_planes_are_those_of_a_counting_machine(tables: bool, row_scale: bool) -> None:
    layout = layout_of(3, 24, row_scale=row_scale)
    machine, outputs, expected = by_machine(layout, tables=tables)
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
    assert dict(machine.counts) == {
        name: count for name, count in operations.compressed(layout, tables=tables).items() if count
    }


@pytest.mark.parametrize("tables", [False, True])
def test_trellis_coded_planes_add_exclusive_ors_to_those_of_their_planes(tables: bool) -> None:
    coded = operations.compressed(layout_of(40, 36, primitive="trellis1", bits=2), tables=tables)
    plain = operations.compressed(layout_of(40, 36, bits=3), tables=tables)
    # Three words of 16 columns in each row, and one exclusive-or fewer than there are bits in a mask.
    expected = 40 * 3 * sum(bin(mask).count("1") - 1 for mask in CODES[2, 3].code.masks)
    assert coded.pop("xor_16_bits") == expected
    assert plain.pop("dram_byte") - coded.pop("dram_byte") == 40 * 5
    assert coded == plain


def test_dense_and_integer_weights_take_one_multiplication_and_one_addition() -> None:
    cases: list[tuple[Counter[Operation], Operation, Operation, int]] = [
        (operations.dense(6, 256), "fp16_multiply", "fp32_add", 2 * 6 * 256),
        (operations.int8(6, 256), "int8_multiply", "int32_add", 6 * 256 + 6 * 2),
        (operations.int4(6, 256), "int8_multiply", "int32_add", 6 * 128 + 6 * 2 * 2),
    ]
    for counts, multiplied, added, nbytes in cases:
        assert counts[multiplied] == counts[added] == 6 * 256
        assert counts["dram_byte"] == nbytes
        assert counts["sram_16_bits"] == 6 + 256


def test_scales_shared_by_rows_are_applied_to_the_inputs() -> None:
    shared = operations.compressed(layout_of(64, 32, group_size=1, group_rows="all"), tables=False)
    assert shared["shift"] == 2 * 2 * 32 + 64  # terms, planes, inputs; and the factor of the matrix for every row
    alone = operations.compressed(layout_of(64, 32, group_size=32), tables=False)
    assert alone["shift"] == 2 * 2 * 64 + 64


def test_every_part_of_a_format_is_charged() -> None:
    plain = operations.compressed(layout_of(8, 64), tables=False)
    rotated = operations.compressed(layout_of(8, 64, rotation="hadamard"), tables=False)
    assert rotated["fp32_add"] - plain["fp32_add"] == 64 * 6
    offset = operations.compressed(layout_of(8, 64, offset=True), tables=False)
    assert offset["fp16_multiply"] - plain["fp16_multiply"] == 8 * 8
    assert offset["fp32_add"] - plain["fp32_add"] == 64 + 2 * 8 * 8
    outliers = operations.compressed(layout_of(8, 64, outlier_columns=2 / 64), tables=False)
    assert outliers["fp16_multiply"] - plain["fp16_multiply"] == 8 * 2
    floats = operations.compressed(layout_of(8, 64, scale_format="float"), tables=False)
    assert floats["fp16_multiply"] == 8 * 8 * 2
    for counts in (rotated, offset, outliers, floats):
        assert counts["dram_byte"] > plain["dram_byte"]
