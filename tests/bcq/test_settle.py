"""Columns that settle one after the other, by every set of compiled kernels and by torch, against their definition."""

from __future__ import annotations

import pytest
import torch
from bcq_problems import generator, quick
from compiled import needs_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.levels import LevelTable
from shiftadd_cli.bcq.settle import settle
from shiftadd_cli.runtime.kernels.extension import instruction_sets

WAYS = ["torch", *instruction_sets()]


def problem(
    columns: int, rows: int, groups: int, bits: int, seed: int
) -> tuple[Tensor, Tensor, LevelTable, Tensor, Tensor]:
    """Goals, coupling (part of a larger matrix, as in a sweep), tables, groups and values."""
    g = generator(seed)
    goals = torch.randn(columns, rows, generator=g)
    whole = 0.3 * torch.randn(columns + 3, columns + 5, generator=g) / columns**0.5
    coupling = whole[1 : columns + 1, 2 : columns + 2]
    coupling.diagonal().copy_(0.5 + torch.rand(columns, generator=g))
    scales = torch.rand(groups, rows, bits, generator=g) * 2.0 ** -torch.arange(bits)
    # Two planes alike, and so levels alike.
    scales[0, :, -1] = scales[0, :, 0]
    tables = LevelTable.build(scales, 0.1 * torch.randn(groups, rows, generator=g))
    of_column = torch.randint(0, groups, (columns,), generator=g)
    return goals, coupling, tables, of_column, torch.randn(columns, rows, generator=g)


@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize("way", WAYS)
@quick
@given(
    columns=st.integers(1, 140),
    rows=st.integers(1, 70),
    groups=st.integers(1, 4),
    bits=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_every_column_takes_the_level_nearest_to_its_goal(
    way: str, descend: bool, columns: int, rows: int, groups: int, bits: int, seed: int
) -> None:
    goals, coupling, tables, of_column, before = problem(columns, rows, groups, bits, seed)
    values = before.clone()
    ranks, steps = settle(goals.clone(), coupling, tables, of_column, values, descend=descend, kernels=way)
    levels = tables.levels.movedim(1, 0)[of_column].double()
    assert torch.equal(levels.gather(1, ranks.long().unsqueeze(1)).squeeze(1), values.double())
    # What columns before moved, by the steps as they were returned: an error does not grow from column to column.
    moved = coupling.double().triu(1).T @ steps.double()
    left, diagonal = goals.double() - moved, coupling.diagonal().double().unsqueeze(1)
    goal = before.double() + left / diagonal if descend else left
    step = values.double() - before.double() if descend else (goal - values.double()) / diagonal
    torch.testing.assert_close(steps.double(), step, rtol=1e-4, atol=1e-4)
    distance = (goal.unsqueeze(1) - levels).abs()
    assert ((goal - values.double()).abs() <= distance.amin(1) + 1e-4).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_goal_on_a_midpoint_takes_the_lower_level(way: str) -> None:
    tables = LevelTable.build(torch.tensor([[[1.0, 2.0]] * 3]), None)
    goals = torch.tensor([[-2.0, 0.0, 2.0]])
    values = torch.zeros_like(goals)
    ranks, _ = settle(
        goals, torch.ones(1, 1), tables, torch.zeros(1, dtype=torch.int64), values, descend=False, kernels=way
    )
    assert ranks.tolist() == [[0, 1, 2]]
    assert values.tolist() == [[-3.0, -1.0, 1.0]]


@needs_kernels
@pytest.mark.parametrize("descend", [False, True])
def test_threads_change_no_bit(descend: bool) -> None:
    goals, coupling, tables, of_column, before = problem(128, 300, 3, 3, 1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            values = before.clone()
            found.append((*settle(goals.clone(), coupling, tables, of_column, values, descend=descend), values))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
