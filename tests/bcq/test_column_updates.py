from __future__ import annotations

import pytest
import torch
from bcq_problems import generator, quadratic_error, quick, random_hessian, random_weights
from compiled import needs_kernels, on_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.column_updates import compensated_sweep, descend_codes
from shiftadd_cli.bcq.hessian import Objective, build_objective
from shiftadd_cli.bcq.levels import LevelTable, nearest_ranks, values_of
from shiftadd_cli.native.extension import instruction_sets


def textbook(weights: Tensor, form: Tensor, order: Tensor, levels: list[Tensor]) -> Tensor:
    """GPTQ as written: quantize a column, move its error onto the free columns with the inverse of their Hessian, and
    take the column out of that inverse by one step of Gaussian elimination. Float64, `[out, in]`.

    levels: `[in]` tensors `[out, L]`.
    """
    w, result = weights.double().clone(), torch.empty_like(weights, dtype=torch.float64)
    inverse = torch.linalg.inv(form.double())
    for j in order.tolist():
        result[:, j] = nearest(w[:, j], levels[j])
        error = (w[:, j] - result[:, j]) / inverse[j, j]
        w -= error.unsqueeze(1) * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        # The rounding residue of an eliminated column must not return.
        inverse[j], inverse[:, j], inverse[j, j] = 0.0, 0.0, 1.0
    return result


def nearest(column: Tensor, levels: Tensor) -> Tensor:
    index = (column.unsqueeze(-1) - levels.double()).abs().argmin(-1)
    return levels.double().gather(1, index.unsqueeze(-1)).squeeze(-1)


def static_problem(
    out: int, columns: int, width: int, bits: int, order: str
) -> tuple[Tensor, Objective, LevelTable, list[Tensor]]:
    weights = random_weights(out, columns)
    objective = build_objective(
        random_hessian(columns), 0.01, "x", order=order, group_columns=width, whole_groups=False
    )
    groups = -(-columns // width)
    padded = torch.nn.functional.pad(weights, (0, groups * width - columns)).view(out, groups, width)
    scales = padded.abs().amax(-1, keepdim=True) * 0.5 ** torch.arange(1, bits + 1)
    tables = LevelTable.build(scales.transpose(0, 1), None)
    return weights, objective, tables, [tables.levels[:, j // width].T for j in range(columns)]


@pytest.mark.parametrize("order", ["hessian", "natural"])
@pytest.mark.parametrize(
    ("columns", "width", "bits"),
    [(1, 1, 3), (13, 5, 2), (40, 64, 3), (128, 32, 2), (150, 50, 3), (300, 7, 1), (300, 300, 3), (280, 140, 5)],
)
def test_static_sweep_equals_the_textbook(columns: int, width: int, bits: int, order: str) -> None:
    weights, objective, tables, levels = static_problem(6, columns, min(width, columns), bits, order)
    width = min(width, columns)
    expected = textbook(weights, objective.damped, objective.order, levels)
    ranks, values = compensated_sweep(weights, objective, width, tables)
    assert ranks.dtype == torch.uint8
    assert torch.equal(values_of(tables, width, ranks), values)
    # A weight on a midpoint may fall either way in float32 and change what follows in its row.
    same = ((values.T.double() - expected).abs() < 1e-5).all(-1)
    assert same.float().mean() >= 0.8
    error, reference = (quadratic_error(weights - v, objective.damped).sum() for v in (values.T, expected))
    assert abs(float(error / reference) - 1) < 0.02


def test_a_sweep_beats_rounding_in_the_norm_it_compensates() -> None:
    weights, objective, tables, _ = static_problem(8, 200, 50, 2, "hessian")
    _, values = compensated_sweep(weights, objective, 50, tables)
    _, rounded = nearest_ranks(weights.T.contiguous(), tables, 50)
    swept, plain = (quadratic_error(weights - v.T, objective.damped).sum() for v in (values, rounded))
    assert swept < 0.7 * plain


def fitted_levels(current: Tensor) -> LevelTable:
    """Levels of a group `[columns, out]`, one set per row; the weight of a group of one is not midway between two."""
    size = current.abs().mean(0)
    return LevelTable.build(torch.stack((0.9 * size, 0.5 * size), dim=-1), None)


def textbook_dynamic(weights: Tensor, form: Tensor, order: Tensor, width: int) -> Tensor:
    """The textbook sweep with the levels of a group fitted to its current weights at its first column."""
    w, result = weights.double().clone(), torch.empty_like(weights, dtype=torch.float64)
    inverse = torch.linalg.inv(form.double())
    tables: dict[int, LevelTable] = {}
    for j in order.tolist():
        group = j // width
        if group not in tables:
            tables[group] = fitted_levels(w[:, group * width : (group + 1) * width].T.float())
        result[:, j] = nearest(w[:, j], tables[group].levels.T)
        error = (w[:, j] - result[:, j]) / inverse[j, j]
        w -= error.unsqueeze(1) * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j], inverse[j, j] = 0.0, 0.0, 1.0
    return result


@pytest.mark.parametrize("order", ["hessian", "natural"])
@pytest.mark.parametrize(("columns", "width"), [(13, 8), (150, 1), (148, 8), (290, 60), (300, 150), (140, 140)])
def test_dynamic_sweep_fits_each_group_once_on_arrival(columns: int, width: int, order: str) -> None:
    weights, hessian = random_weights(6, columns), random_hessian(columns)
    # The ragged last group comes first in the order, so that blocks of columns and groups do not line up.
    hessian[-(columns % width or width) :] *= 30
    hessian[:, -(columns % width or width) :] *= 30
    objective = build_objective(hessian, 0.01, "x", order=order, group_columns=width, whole_groups=True)
    arrived: list[int] = []

    def levels(group: int, current: Tensor) -> LevelTable:
        arrived.append(group)
        assert current.shape == (min(width, columns - group * width), 6)
        return fitted_levels(current)[None]

    _, values = compensated_sweep(weights, objective, width, levels)
    assert sorted(arrived) == list(range(-(-columns // width)))
    expected = textbook_dynamic(weights, objective.damped, objective.order, width)
    same = ((values.T.double() - expected).abs() < 1e-4).all(-1)
    assert same.float().mean() >= 0.6
    error, reference = (quadratic_error(weights - v, objective.damped).sum() for v in (values.T, expected))
    assert abs(float(error / reference) - 1) < 0.05


def problem(out: int, columns: int, width: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, LevelTable]:
    """Weights `[in, out]`, Hessian, tables."""
    weights = random_weights(out, columns, seed).T.contiguous()
    groups = -(-columns // width)
    g = generator(seed)
    scales = 0.08 * torch.rand(out, groups, bits, generator=g)
    tables = LevelTable.build(scales.transpose(0, 1), 0.01 * torch.randn(groups, out, generator=g))
    return weights, random_hessian(columns, seed) + 0.01 * torch.eye(columns), tables


@quick
@given(
    out=st.integers(1, 5),
    columns=st.integers(1, 40),
    width=st.integers(1, 40),
    bits=st.integers(1, 6),
    passes=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_descent_never_raises_the_objective(
    out: int, columns: int, width: int, bits: int, passes: int, seed: int
) -> None:
    weights, hessian, tables = problem(out, columns, width, bits, seed)
    start = torch.randint(0, 2**bits, (columns, out), generator=generator(seed)).to(torch.uint8)
    given_values = values_of(tables, width, start)
    untouched = given_values.clone()
    ranks, values = descend_codes(weights, hessian, tables, width, given_values, passes)
    assert torch.equal(given_values, untouched)
    assert ranks.dtype == torch.uint8
    assert torch.equal(values, values_of(tables, width, ranks))
    before = quadratic_error((weights - given_values).T, hessian)
    after = quadratic_error((weights - values).T, hessian)
    assert (after <= before * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize(("columns", "width", "bits"), [(1, 1, 2), (20, 7, 3), (150, 64, 2), (300, 100, 1), (20, 8, 5)])
def test_no_single_weight_can_improve_at_rest(columns: int, width: int, bits: int) -> None:
    weights, hessian, tables = problem(3, columns, width, bits)
    _, rounded = nearest_ranks(weights, tables, width)
    ranks, values = descend_codes(weights, hessian, tables, width, rounded, 200)
    again, _ = descend_codes(weights, hessian, tables, width, values, 1)
    assert torch.equal(again, ranks)
    wide, form = (weights - values).double(), hessian.double()
    gradient = form @ wide
    for column in range(columns):
        # Moving one weight by s changes the objective by s² H_jj − 2 s g_j.
        step = tables.levels[:, column // width].double() - values[column].double()
        change = step.square() * form[column, column] - 2 * step * gradient[column]
        assert (change > -1e-6 * (1 + quadratic_error(wide.T, form))).all()
    if columns > 1:
        assert quadratic_error(wide.T, form).sum() < quadratic_error((weights - rounded).T, form).sum()


def test_blocks_do_not_change_results() -> None:
    # One pass over 300 columns is compared with a pass that refreshes the whole gradient after every weight.
    weights, hessian, tables = problem(4, 300, 50, 3)
    _, values = nearest_ranks(weights, tables, 50)
    _, descended = descend_codes(weights, hessian, tables, 50, values, 1)
    expected, form = values.double(), hessian.double()
    for column in range(300):
        goal = expected[column] + (form[column] @ (weights.double() - expected)) / form[column, column]
        levels = tables.levels[:, column // 50].double()
        expected[column] = levels.gather(0, (levels - goal).abs().argmin(0, keepdim=True)).squeeze(0)
    same = ((descended.double() - expected).abs() < 1e-6).all(0)
    assert same.float().mean() >= 0.5
    ratio = quadratic_error((weights - descended).T, form).sum() / quadratic_error((weights - expected).T, form).sum()
    assert abs(float(ratio) - 1) < 0.01


def test_a_diagonal_hessian_gives_nearest_levels_in_one_pass() -> None:
    weights, _, tables = problem(5, 60, 20, 3)
    start = torch.randint(0, 8, (60, 5), generator=generator(1)).to(torch.uint8)
    hessian = torch.diag(torch.rand(60, generator=generator(2)) + 0.1)
    _, values = descend_codes(weights, hessian, tables, 20, values_of(tables, 20, start), 1)
    _, nearest = nearest_ranks(weights, tables, 20)
    torch.testing.assert_close((weights - values).abs(), (weights - nearest).abs(), rtol=0, atol=1e-6)


WAYS = ["torch", *instruction_sets()]


def columns_problem(
    columns: int, rows: int, groups: int, bits: int, seed: int
) -> tuple[Tensor, Tensor, LevelTable, Tensor, Tensor]:
    """Goals, coupling (part of a larger matrix, as in a sweep), tables, groups and values."""
    g = generator(seed)
    goals = torch.randn(columns, rows, generator=g)
    matrix = 0.3 * torch.randn(columns + 3, columns + 5, generator=g) / columns**0.5
    coupling = matrix[1 : columns + 1, 2 : columns + 2]
    coupling.diagonal().copy_(0.5 + torch.rand(columns, generator=g))
    scales = torch.rand(groups, rows, bits, generator=g) * 2.0 ** -torch.arange(bits)
    # Two planes are equal, so some levels are too.
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
    goals, coupling, tables, of_column, before = columns_problem(columns, rows, groups, bits, seed)
    values = before.clone()
    ranks, steps = tables.settle(goals.clone(), coupling, of_column, values, descend=descend, kernels=way)
    levels = tables.levels.movedim(1, 0)[of_column].double()
    assert torch.equal(levels.gather(1, ranks.long().unsqueeze(1)).squeeze(1), values.double())
    # The effect of earlier columns comes from the returned steps, so errors do not grow from column to column.
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
    ranks, _ = tables.settle(
        goals, torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), values, descend=False, kernels=way
    )
    assert ranks.tolist() == [[0, 1, 2]]
    assert values.tolist() == [[-3.0, -1.0, 1.0]]


@needs_kernels
@pytest.mark.parametrize("descend", [False, True])
def test_threads_change_no_bit(descend: bool) -> None:
    goals, coupling, tables, of_column, before = columns_problem(128, 300, 3, 3, 1)

    def settled() -> tuple[Tensor, ...]:
        values = before.clone()
        return *tables.settle(goals.clone(), coupling, of_column, values, descend=descend), values

    results = on_threads((1, 3), settled)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
