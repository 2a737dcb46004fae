from __future__ import annotations

import torch
from bcq_problems import generator, quick, random_spd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.levels import LevelTable, code_signs
from shiftadd_cli.bcq.ranks import codes_of, flip_negative, nearest_ranks, ranks_of, values_of


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
