from __future__ import annotations

import pytest
import torch
from bcq_problems import all_levels, generator, quick, random_spd
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.levels import (
    LevelTable,
    code_signs,
    codes_of,
    flip_negative,
    nearest_ranks,
    planes_of,
    ranks_of,
    ranks_within,
    values_of,
)


def tables(bits: int, offset: bool, seed: int = 0) -> tuple[Tensor, Tensor | None, LevelTable]:
    """Scales `[2, 5, bits]`, among them a zero scale and two equal ones."""
    g = generator(seed)
    scales = torch.rand(2, 5, bits, generator=g)
    scales[0, 0, -1] = 0.0
    scales[1, 1] = scales[1, 1, 0]
    offsets = torch.randn(2, 5, generator=g) if offset else None
    return scales, offsets, LevelTable.build(scales, offsets)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("offset", [False, True])
def test_levels_are_all_signed_sums_in_order_with_their_codes(bits: int, offset: bool) -> None:
    scales, offsets, table = tables(bits, offset)
    assert table.codes.dtype == torch.uint8
    assert table.levels.shape == (2**bits, 2, 5)
    assert (table.levels.diff(dim=0) >= 0).all()
    for r in range(2):
        for c in range(5):
            sums = all_levels(scales[r, c], 0.0 if offsets is None else float(offsets[r, c]))
            expected = sums[table.codes[:, r, c].long()]
            torch.testing.assert_close(table.levels[:, r, c].double(), expected, rtol=0, atol=1e-5)
            assert sorted(table.codes[:, r, c].tolist()) == list(range(2**bits))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("offset", [False, True])
def test_nearest_agrees_with_a_search_of_all_levels(bits: int, offset: bool) -> None:
    _, _, table = tables(bits, offset)
    for seed in range(20):
        weights = torch.randn(2, 5, generator=generator(seed)) * bits / 2
        rank, value = table.nearest(weights)
        distance = (table.levels - weights).abs()
        assert torch.equal(value, table.levels.gather(0, rank.unsqueeze(0)).squeeze(0))
        torch.testing.assert_close((value - weights).abs(), distance.amin(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 5])
def test_the_lower_level_wins_on_a_midpoint(bits: int) -> None:
    table = LevelTable.build(2.0 ** torch.arange(bits).view(1, bits), None)
    for j in range(2**bits - 1):
        rank, _ = table.nearest(table.midpoints[j])
        assert int(rank) == j


def test_indexing_takes_part_of_the_batch() -> None:
    _, _, table = tables(3, True)
    part = table[1]
    assert torch.equal(part.levels, table.levels[:, 1])
    assert torch.equal(table[1, 2:4].midpoints, table.midpoints[:, 1, 2:4])
    assert torch.equal(table[1, 2:4].codes, table.codes[:, 1, 2:4])


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_b_of_a_code_is_the_sign_of_plane_b(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (4, 7), generator=generator(bits)).to(torch.uint8)
    planes = planes_of(codes, bits)
    assert planes.shape == (4, bits, 7)
    signs = code_signs(bits)
    for b in range(bits):
        assert torch.equal(planes[:, b], (codes.int() // 2**b) % 2 == 1)
        assert torch.equal(planes[:, b].float() * 2 - 1, signs[codes.int(), b])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_ranks_within_are_those_of_a_search(levels: int, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    midpoints = torch.randn(3, 2, levels, generator=g).sort(-1).values
    values = torch.randn(3, 2, count, generator=g)
    # A value on a midpoint belongs below it.
    values[0, 0, 0] = midpoints[0, 0, 0]
    assert torch.equal(ranks_within(values, midpoints), torch.searchsorted(midpoints, values))


def random_tables(columns: int, out: int, width: int, bits: int, offset: bool) -> tuple[Tensor, Tensor, LevelTable]:
    """Scales `[out, C, bits]` and offsets `[out, C]`, zero where there are none."""
    g = generator(columns + bits)
    groups = -(-columns // width)
    scales = torch.rand(out, groups, bits, generator=g)
    offsets = torch.randn(out, groups, generator=g) if offset else torch.zeros(out, groups)
    return scales, offsets, LevelTable.build(scales.transpose(0, 1), offsets.T)


problems = st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.booleans())


@quick
@given(problems)
def test_codes_ranks_and_values_agree(shape: tuple[int, int, int, int, bool]) -> None:
    columns, out, width, bits, _ = shape
    scales, offsets, tables = random_tables(*shape)
    ranks = torch.randint(0, 2**bits, (columns, out), generator=generator(1)).to(torch.uint8)
    codes = codes_of(tables, width, ranks)
    assert codes.dtype == torch.uint8
    assert torch.equal(ranks_of(tables, width, codes), ranks)
    values = values_of(tables, width, ranks)
    signs = code_signs(bits).double()
    for column in range(columns):
        for row in range(out):
            group = column // width
            value = signs[int(codes[column, row])] @ scales[row, group].double() + offsets[row, group].double()
            assert abs(float(values[column, row]) - float(value)) < 1e-5


@quick
@given(problems)
def test_nearest_ranks_leave_no_nearer_level(shape: tuple[int, int, int, int, bool]) -> None:
    columns, out, width, _, _ = shape
    _, _, tables = random_tables(*shape)
    weights = torch.randn(columns, out, generator=generator(2)) * 2
    ranks, values = nearest_ranks(weights, tables, width)
    assert torch.equal(values, values_of(tables, width, ranks))
    for column in range(columns):
        best = (tables.levels[:, column // width] - weights[column]).abs().amin(0)
        torch.testing.assert_close((values[column] - weights[column]).abs(), best, rtol=0, atol=1e-6)


@quick
@given(problems)
def test_flipped_planes_keep_values_and_cost(shape: tuple[int, int, int, int, bool]) -> None:
    columns, out, width, bits, offset = shape
    g = generator(5)
    groups, terms = -(-columns // width), bits + offset
    scales = torch.randn(out, groups, bits, generator=g)
    codes = torch.randint(0, 2**bits, (columns, out), generator=g).to(torch.uint8)
    curvature = random_spd(terms, batch=(out, groups))
    new_codes, new_scales, new_curvature = flip_negative(codes, scales, curvature, width)
    assert (new_scales >= 0).all()
    signs = code_signs(bits)
    group_of = torch.arange(columns) // width
    before = (signs[codes.int()] * scales[:, group_of].transpose(0, 1)).sum(-1)
    after = (signs[new_codes.int()] * new_scales[:, group_of].transpose(0, 1)).sum(-1)
    assert torch.equal(before, after)
    # A plane and its scale change sign together, so moving both scales alike costs the same.
    step = torch.randn(out, groups, terms, generator=g)
    flipped = step.clone()
    flipped[..., :bits] *= torch.where(scales < 0, -1.0, 1.0)
    cost = (step.unsqueeze(-2) @ curvature @ step.unsqueeze(-1)).squeeze()
    new_cost = (flipped.unsqueeze(-2) @ new_curvature @ flipped.unsqueeze(-1)).squeeze()
    torch.testing.assert_close(cost, new_cost)
