from __future__ import annotations

import pytest
import torch
from bcq_problems import quick
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.bcq.grid import ScaleGrid


@st.composite
def grids(draw: st.DrawFn) -> ScaleGrid:
    rows, columns = draw(st.integers(1, 13)), draw(st.integers(1, 21))
    group_rows = draw(st.one_of(st.integers(1, 15), st.sampled_from(["all", "1/2", "1/8"])))
    group_size = draw(st.one_of(st.integers(1, 24), st.just("all")))
    return ScaleGrid.resolve(rows, columns, group_rows, group_size)


@pytest.mark.parametrize(
    ("group_rows", "group_size", "block"),
    [
        (1, 64, (1, 64)),
        (1, "all", (1, 100)),
        ("all", 1, (20, 1)),
        ("1/8", 8, (3, 8)),
        ("1/40", 8, (1, 8)),
        (7, 1000, (7, 100)),
        (1000, 3, (20, 3)),
    ],
)
def test_resolve_gives_block_sizes_within_the_matrix(
    group_rows: int | str, group_size: int | str, block: tuple[int, int]
) -> None:
    grid = ScaleGrid.resolve(20, 100, group_rows, group_size)
    assert (grid.group_rows, grid.group_columns) == block


@quick
@given(grids())
def test_expansions_follow_the_index_formula(grid: ScaleGrid) -> None:
    values = torch.arange(grid.row_groups * grid.column_groups).float().view(grid.row_groups, grid.column_groups)
    wide = grid.expand_columns(grid.expand_rows(values))
    assert wide.shape == (grid.rows, grid.columns)
    for row in range(grid.rows):
        for column in range(grid.columns):
            assert wide[row, column] == values[row // grid.group_rows, column // grid.group_columns]


@quick
@given(grids(), st.data())
def test_selected_rows_are_those_of_the_expansion(grid: ScaleGrid, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, grid.rows - 1))
    stop = data.draw(st.integers(start + 1, grid.rows))
    values = torch.rand(grid.row_groups, 2)
    assert torch.equal(grid.select_rows(values, slice(start, stop)), grid.expand_rows(values)[start:stop])


@quick
@given(grids())
def test_blocks_have_each_weight_once_and_zeros_for_padding(grid: ScaleGrid) -> None:
    matrix = torch.arange(1, grid.rows * grid.columns + 1).float().view(grid.rows, grid.columns)
    blocks = grid.blocks(matrix)
    assert blocks.shape == (grid.row_groups, grid.column_groups, grid.group_rows * grid.group_columns)
    for r in range(grid.row_groups):
        for c in range(grid.column_groups):
            rows = slice(r * grid.group_rows, (r + 1) * grid.group_rows)
            columns = slice(c * grid.group_columns, (c + 1) * grid.group_columns)
            inside = sorted(matrix[rows, columns].flatten().tolist())
            values = sorted(blocks[r, c].tolist())
            assert values == [0.0] * (len(values) - len(inside)) + inside


def test_blocks_take_expanded_and_transposed_matrices() -> None:
    grid = ScaleGrid(4, 6, 2, 3)
    row = torch.arange(6.0)
    assert torch.equal(grid.blocks(row.expand(4, 6)), grid.blocks(row.expand(4, 6).contiguous()))
    matrix = torch.rand(6, 4)
    assert torch.equal(grid.blocks(matrix.T), grid.blocks(matrix.T.contiguous()))
