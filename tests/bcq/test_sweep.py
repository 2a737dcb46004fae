from __future__ import annotations

import pytest
import torch
from bcq_problems import quadratic_error, random_hessian, random_weights
from torch import Tensor

from shiftadd_cli.bcq.hessian import Objective, build_objective
from shiftadd_cli.bcq.levels import LevelTable
from shiftadd_cli.bcq.ranks import nearest_ranks, values_of
from shiftadd_cli.bcq.sweep import compensated_sweep


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
        # What rounding leaves of a column that is out must not come back.
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
def test_static_sweep_is_the_textbook_one(columns: int, width: int, bits: int, order: str) -> None:
    weights, objective, tables, levels = static_problem(6, columns, min(width, columns), bits, order)
    width = min(width, columns)
    expected = textbook(weights, objective.damped, objective.order, levels)
    ranks, values = compensated_sweep(weights, objective, width, tables)
    assert ranks.dtype == torch.uint8
    assert torch.equal(values_of(tables, width, ranks), values)
    # A weight on a midpoint may fall either way in float32 and change what follows in its row.
    same = ((values.T.double() - expected).abs() < 1e-5).all(-1)
    assert same.float().mean() >= 0.8
    found, reference = (quadratic_error(weights - v, objective.damped).sum() for v in (values.T, expected))
    assert abs(float(found / reference) - 1) < 0.02


def test_a_sweep_beats_rounding_in_the_norm_it_compensates() -> None:
    weights, objective, tables, _ = static_problem(8, 200, 50, 2, "hessian")
    _, values = compensated_sweep(weights, objective, 50, tables)
    _, rounded = nearest_ranks(weights.T.contiguous(), tables, 50)
    swept, plain = (quadratic_error(weights - v.T, objective.damped).sum() for v in (values, rounded))
    assert swept < 0.7 * plain


def fitted_levels(current: Tensor) -> LevelTable:
    """Levels of a group `[columns, out]`, one set per row; the weight of a group of one is not midway of two."""
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
        return fitted_levels(current)

    _, values = compensated_sweep(weights, objective, width, levels)
    assert sorted(arrived) == list(range(-(-columns // width)))
    expected = textbook_dynamic(weights, objective.damped, objective.order, width)
    same = ((values.T.double() - expected).abs() < 1e-4).all(-1)
    assert same.float().mean() >= 0.6
    found, reference = (quadratic_error(weights - v, objective.damped).sum() for v in (values.T, expected))
    assert abs(float(found / reference) - 1) < 0.05
