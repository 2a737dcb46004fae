"""Columns that take the best path: the levels of the stored bits, the least error, and every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from bcq_problems import generator, quick
from compiled import needs_kernels, on_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.primitives.trellis.code import TrellisCode
from shiftadd_cli.bcq.primitives.trellis.codes import CODES
from shiftadd_cli.bcq.primitives.trellis.paths import BestPaths
from shiftadd_cli.native.extension import cpu_extension, instruction_sets

WAYS = ["torch", *instruction_sets()]
FORMAT_CODES = [entry.code for entry in CODES.values()]


def paths_of(code: TrellisCode, rows: int, groups: int, stripe: int, seed: int) -> BestPaths:
    return BestPaths(code, stripe, torch.randn(groups, rows, 1 << code.planes, generator=generator(seed)))


def columns_problem(columns: int, rows: int, groups: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Goals, coupling, groups and values."""
    g = generator(seed)
    coupling = 0.3 * torch.randn(columns, columns + 2, generator=g)[:, 1:-1] / columns**0.5
    coupling.diagonal().copy_(0.5 + torch.rand(columns, generator=g))
    of_column = torch.randint(0, groups, (columns,), generator=g)
    return torch.randn(columns, rows, generator=g), coupling, of_column, torch.randn(columns, rows, generator=g)


@pytest.mark.parametrize("code", FORMAT_CODES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_no_path_of_a_short_column_is_better(code: TrellisCode, way: str) -> None:
    rows = 9 // code.bits
    paths = paths_of(code, rows, 1, 256, seed=code.planes)
    columns = torch.randn(5, rows, generator=generator(1))
    values = torch.empty_like(columns)
    paths.settle(columns.clone(), torch.eye(5), torch.zeros(5, dtype=torch.int64), values, descend=False, kernels=way)
    every = torch.tensor(list(itertools.product(range(1 << code.bits), repeat=rows))).T
    selected = code.selected(every, 256).unsqueeze(-1)
    reachable = paths.levels[0].unsqueeze(1).expand(-1, every.shape[1], -1).gather(-1, selected).squeeze(-1)
    errors = (columns.double().unsqueeze(-1) - reachable.double()).square().sum(1)
    torch.testing.assert_close((columns.double() - values.double()).square().sum(1), errors.amin(1))


@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize("way", instruction_sets())
@quick
@given(
    code=st.sampled_from(FORMAT_CODES),
    columns=st.integers(1, 6),
    rows=st.integers(1, 50),
    groups=st.integers(1, 3),
    stripe=st.sampled_from([1, 7, 32, 256]),
    seed=st.integers(0, 2**16),
)
def test_columns_take_the_best_path_to_their_goals(
    way: str, descend: bool, code: TrellisCode, columns: int, rows: int, groups: int, stripe: int, seed: int
) -> None:
    paths = paths_of(code, rows, groups, stripe, seed)
    goals, coupling, of_column, before = columns_problem(columns, rows, groups, seed)
    values = before.clone()
    stored, steps = paths.settle(goals.clone(), coupling, of_column, values, descend=descend, kernels=way)
    # The effect of earlier columns comes from the returned steps, so errors do not grow from column to column.
    moved = coupling.double().triu(1).T @ steps.double()
    left, diagonal = goals.double() - moved, coupling.diagonal().double().unsqueeze(1)
    goal = before.double() + left / diagonal if descend else left
    step = values.double() - before.double() if descend else (goal - values.double()) / diagonal
    torch.testing.assert_close(steps.double(), step, rtol=1e-4, atol=1e-4)
    selected = code.selected(stored.T, stripe).T
    for column, group in enumerate(of_column.tolist()):
        chosen = paths.levels[group].gather(1, selected[column].unsqueeze(1)).squeeze(1)
        assert torch.equal(chosen, values[column])
        _, best = code.encode(goal[column], paths.levels[group].double(), stripe)
        error, least = ((goal[column] - taken.double()).square().sum() for taken in (values[column], best))
        assert error <= least * (1 + 1e-4) + 1e-4


@needs_kernels
@pytest.mark.parametrize("code", FORMAT_CODES, ids=str)
def test_every_instruction_set_gives_the_bits_of_the_reference(code: TrellisCode) -> None:
    paths, columns = paths_of(code, 300, 2, 256, seed=3), torch.randn(3, 300, generator=generator(4))
    groups, alone = torch.tensor([0, 1, 1]), torch.eye(3)
    results = []
    for way in WAYS:
        values = torch.empty_like(columns)
        stored, _ = paths.settle(columns.clone(), alone, groups, values, descend=False, kernels=way)
        results.append((stored, values))
    for stored, values in results[1:]:
        assert torch.equal(stored, results[0][0])
        assert torch.equal(values, results[0][1])


@needs_kernels
@pytest.mark.parametrize("descend", [False, True])
def test_threads_change_no_bit(descend: bool) -> None:
    paths = paths_of(CODES[2, 3].code, 600, 2, 256, seed=1)
    goals, coupling, of_column, before = columns_problem(40, 600, 2, 1)

    def settled() -> tuple[Tensor, ...]:
        values = before.clone()
        return *paths.settle(goals.clone(), coupling, of_column, values, descend=descend), values

    results = on_threads((1, 3), settled)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_codes_without_a_kernel_use_the_reference() -> None:
    code = TrellisCode(2, 4, (0x9, 0x16, 0x21))
    paths, columns = paths_of(code, 20, 1, 8, seed=5), torch.randn(4, 20, generator=generator(6))
    stored, values = paths.closest(columns, torch.zeros(4, dtype=torch.int64))
    for column, taken, bits in zip(columns, values, stored, strict=True):
        expected_bits, expected = code.encode(column, paths.levels[0], 8)
        assert torch.equal(taken, expected)
        assert torch.equal(bits, expected_bits)


@needs_kernels
def test_the_kernels_decode_the_codes_of_the_format() -> None:
    known = {(bits, planes): tuple(masks) for bits, planes, masks in cpu_extension().trellis_codes()}
    assert known == {sizes: entry.code.masks for sizes, entry in CODES.items()}
