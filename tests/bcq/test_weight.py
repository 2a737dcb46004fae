from __future__ import annotations

from typing import Any

import pytest
import torch
from artifacts import random_weight
from bcq_problems import generator, quick
from formats import layout_on, matrix_format
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.choices import Primitive
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.primitives.shifts.levels import MAGNITUDES
from shiftadd_cli.bcq.scale_formats import scale_format
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight

FORMATS = ("pot", "apot2", "apot3", "float")
NIBBLES = {"pot": 1, "apot2": 2, "apot3": 3}


def random_parts(layout: PackedLayout, seed: int) -> dict[str, Any]:
    """Arguments of `QuantizedWeight.pack` on the scale format; a tenth of the scales zero, one group all zero."""
    g = generator(seed)
    grid, form = layout.grid, scale_format(layout.scales.scale_format)
    ratios = form.round(torch.exp2(-12 * torch.rand(grid.row_groups, grid.column_groups, layout.bits, generator=g)))
    ratios = torch.where(torch.rand(ratios.shape, generator=g) < 0.1, 0.0, ratios)
    ratios[0, 0] = 0.0
    if layout.scales.row_scale:
        row_scale = (0.01 + torch.rand(grid.rows, generator=g)).bfloat16().float()
    else:
        row_scale = torch.tensor([2.0**-3])
    offsets = None
    if layout.scales.offset and form.nibbles:
        multiples = torch.randint(-8, 8, (grid.row_groups, grid.column_groups), generator=g)
        offsets = multiples * ratios.amax(-1) / 8
    elif layout.scales.offset:
        offsets = torch.randn(grid.row_groups, grid.column_groups, generator=g).half().float()
    planes = torch.rand(grid.rows, layout.bits, grid.columns, generator=g) > 0.5
    return {"planes": planes, "ratios": ratios, "row_scale": row_scale, "offsets": offsets}


def nibble_at(stream: Tensor, index: int) -> int:
    return int(stream[index // 2]) >> (4 * (index % 2)) & 15


def scalar_ratio(nibbles: list[int]) -> float:
    """Σ of the signed powers of two that the nibbles of one scale stand for."""
    if nibbles[0] == 15:
        return 0.0
    exponent = nibbles[0]
    value = 2.0**-exponent
    for nibble in nibbles[1:]:
        exponent += nibble & 7
        if nibble & 7:
            value += (-1.0 if nibble & 8 else 1.0) * 2.0**-exponent
    return value


def slow_decode(layout: PackedLayout, tensors: dict[str, Tensor]) -> Tensor:
    """Element by element in float64 from the stored bytes, by the formula and table in the docstring of `weight`."""
    grid, bits = layout.grid, layout.bits
    out = torch.empty(grid.rows, grid.columns, dtype=torch.float64)
    for o in range(grid.rows):
        r = o // grid.group_rows
        for i in range(grid.columns):
            c = i // grid.group_columns
            scales = []
            for b in range(bits):
                if layout.scales.scale_format == "float":
                    scales.append(float(tensors["weight_scales"][r, c, b]))
                    continue
                n = NIBBLES[layout.scales.scale_format]
                first = (c * bits + b) * n
                scales.append(scalar_ratio([nibble_at(tensors["weight_exponents"][r], first + k) for k in range(n)]))
            value = 0.0
            for b in range(bits):
                bit = int(tensors["weight_codes"][o, b, i // 8]) >> (i % 8) & 1
                value += scales[b] if bit else -scales[b]
            if layout.scales.offset and layout.scales.scale_format == "float":
                value += float(tensors["weight_offset"][r, c])
            elif layout.scales.offset:
                nibble = nibble_at(tensors["weight_offset"][r], c)
                value += (nibble - 16 if nibble > 7 else nibble) / 8 * max(scales)
            row_scale = tensors["weight_row_scale"]
            out[o, i] = value * float(row_scale[o if layout.scales.row_scale else 0])
    return out


def check_layout(weight: QuantizedWeight) -> None:
    declared = weight.layout.tensors()
    assert set(declared) == set(weight.tensors)
    for name, tensor in weight.tensors.items():
        assert (tuple(tensor.shape), tensor.dtype) == declared[name], name
        assert tensor.is_contiguous()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weight.tensors.values())
    assert weight.layout.nbytes == stored
    assert weight.layout.bits_per_weight == 8 * stored / (weight.layout.grid.rows * weight.layout.grid.columns)


def check_decode(layout: PackedLayout, seed: int) -> None:
    parts = random_parts(layout, seed)
    weight = QuantizedWeight.pack(layout, **parts)
    check_layout(weight)
    slow = slow_decode(layout, weight.tensors)
    decoded = weight.decode()
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.double(), slow, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight.ratios(), parts["ratios"])
    # The parts before packing give the same matrix, so the bytes lose nothing.
    grid = layout.grid
    scales = grid.expand_columns(grid.expand_rows(parts["ratios"]).transpose(1, 2))
    dense = ((parts["planes"].double() * 2 - 1) * scales.double()).sum(1)
    if parts["offsets"] is not None:
        offsets = weight.offsets(weight.ratios())
        assert offsets is not None
        assert torch.equal(offsets, parts["offsets"])
        dense += grid.expand_columns(grid.expand_rows(parts["offsets"])).double()
    torch.testing.assert_close(dense * parts["row_scale"].double().view(-1, 1), slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    ("group_rows", "group_size"), [(1, 64), (1, 5), (1, "all"), ("all", 1), ("1/8", 8), (3, 7)], ids=str
)
def test_decode_equals_the_formula_for_every_group_shape(
    scale_format: str, offset: bool, group_rows: int | str, group_size: int | str
) -> None:
    grid = ScaleGrid.resolve(11, 67, group_rows, group_size)
    for row_scale in (False, True):
        check_decode(layout_on(grid, 3, scale_format, row_scale, offset), seed=1)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_decode_equals_the_formula_for_every_number_of_planes(scale_format: str, bits: int) -> None:
    check_decode(layout_on(ScaleGrid.resolve(5, 21, 1, 8), bits, scale_format, True, True), seed=bits)


@quick
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 30),
    group_rows=st.sampled_from([1, 2, "all", "1/2"]),
    group_size=st.one_of(st.integers(1, 32), st.just("all")),
    bits=st.integers(1, 4),
    scale_format=st.sampled_from(FORMATS),
    row_scale=st.booleans(),
    offset=st.booleans(),
    seed=st.integers(0, 9),
)
def test_decode_equals_the_formula_for_any_size(
    rows: int,
    columns: int,
    group_rows: int | str,
    group_size: int | str,
    bits: int,
    scale_format: str,
    row_scale: bool,
    offset: bool,
    seed: int,
) -> None:
    grid = ScaleGrid.resolve(rows, columns, group_rows, group_size)
    check_decode(layout_on(grid, bits, scale_format, row_scale, offset), seed)


@pytest.mark.parametrize(("group_rows", "row_scale"), [(1, True), ("1/2", False)])
@pytest.mark.parametrize("height", [1, 3, 4, 11, 100])
def test_tiles_equal_the_decoded_rows_bit_for_bit(group_rows: int | str, row_scale: bool, height: int) -> None:
    layout = layout_on(ScaleGrid.resolve(11, 37, group_rows, 8), 3, "apot2", row_scale, True)
    weight = QuantizedWeight.pack(layout, **random_parts(layout, 2))
    decoded, next_row = weight.decode(), 0
    for rows, tile in weight.tiles(height):
        assert rows.start == next_row
        assert torch.equal(tile, decoded[rows])
        next_row = rows.stop
    assert next_row == 11


def test_the_layout_counts_every_stored_bit() -> None:
    # 3 planes, 9 groups of 3 scales of 8 bits and an offset of 4 bits to 576 weights, 16 bits of row scale.
    layout = layout_on(ScaleGrid.resolve(960, 576, 1, 64), 3, "apot2", True, True)
    assert layout.bits_per_weight == 3 + (9 * 3 * 8 + 40 + 16) / 576
    assert layout.nbytes == 960 * (576 * 3 // 8 + 27 + 5 + 2)


@quick
@given(
    kind=st.sampled_from(sorted(MAGNITUDES)),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
    rotation=st.sampled_from(["none", "hadamard"]),
)
def test_shift_layers_decode_to_the_levels_that_were_packed(
    kind: tuple[Any, int], rows: int, columns: int, seed: int, rotation: str
) -> None:
    primitive, bits = kind
    form = matrix_format(bits, 16, "all", row_scale=False, offset=True, rotation=rotation, primitive=primitive)
    layout = PackedLayout(form, rows, columns)
    g = generator(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g)
    row_scale = (0.01 + torch.rand(rows, generator=g)).bfloat16().float()
    planes = torch.stack([codes >> bit & 1 for bit in range(bits)], dim=1).bool()
    signs = torch.ones(columns) if rotation == "hadamard" else None
    weight = QuantizedWeight.pack(layout, planes, torch.zeros(rows, 1, 0), row_scale, None, signs)
    check_layout(weight)
    # Only codes and row scales are stored, whatever the scale fields say.
    assert layout.nbytes == rows * (bits * -(-columns // 8) + 2) + (-(-columns // 8) if signs is not None else 0)
    # The highest bit is the sign, and the others are the index of a magnitude, whose unit is a power of two.
    magnitudes = MAGNITUDES[kind]
    unit = 2.0 ** -(magnitudes[-1].bit_length() - 1)
    for o in range(rows):
        for i in range(columns):
            code = sum((int(weight.tensors["weight_codes"][o, b, i // 8]) >> (i % 8) & 1) << b for b in range(bits))
            sign = 1 if code >> (bits - 1) else -1
            expected = sign * magnitudes[code % 2 ** (bits - 1)] * unit * float(row_scale[o])
            assert float(weight.decode_stored()[o, i]) == pytest.approx(expected, rel=1e-7)
    for height in (1, 4):
        assert torch.equal(torch.cat([tile for _, tile in weight.tiles(height)]), weight.decode_stored())


CODES: list[tuple[Primitive, int]] = [("bcq", 3), ("trellis1", 2), ("trellis2", 3), ("shift2", 4)]
WIDTHS: list[int | str] = ["all", 5, 16]
HEIGHTS: list[int | str] = [1, 3, "all", "1/8"]


@quick
@given(st.data())
def test_gathered_rows_are_those_of_the_decoded_matrix(data: st.DataObject) -> None:
    primitive, bits = data.draw(st.sampled_from(CODES))
    form = matrix_format(
        bits,
        data.draw(st.sampled_from(WIDTHS)),
        data.draw(st.sampled_from(HEIGHTS)),
        data.draw(st.sampled_from(FORMATS)),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        data.draw(st.sampled_from(["none", "hadamard"])),
        data.draw(st.sampled_from([0.0, 0.1])),
        primitive,
    )
    # Two stripes of trellis-coded planes.
    layout = PackedLayout(form, 300, data.draw(st.sampled_from([9, 40])))
    weight = random_weight(layout, seed=data.draw(st.integers(0, 99)))
    numbers = torch.tensor(data.draw(st.lists(st.sampled_from([0, 1, 3, 7, 255, 256, 260, 299]), max_size=6))).long()
    torch.testing.assert_close(weight.gather(numbers), weight.decode()[numbers], rtol=1e-6, atol=1e-6)
    grid = numbers.repeat(2, 1)
    assert torch.equal(weight.gather(grid), torch.stack((weight.gather(numbers),) * 2))
