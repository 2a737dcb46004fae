from __future__ import annotations

from typing import Any

import pytest
import torch
from bcq_problems import quadratic_error, random_hessian, random_weights
from formats import solver_options
from torch import Tensor

from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.hessian import Objective, build_objective
from shiftadd_cli.bcq.levels import code_signs
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.primitives.planes.problem import PlaneProblem
from shiftadd_cli.bcq.snap import SnappedScales

SHARED: dict[str, Any] = {"row_scale": False, "refine_rounds": 0}


def objective_for(options: SolverOptions, columns: int, seed: int = 0) -> Objective:
    hessian = random_hessian(columns, seed)
    # Strong last columns bring a ragged last group to the front of the sweep.
    hessian[-4:] *= 30
    hessian[:, -4:] *= 30
    return build_objective(
        hessian,
        options.weight_error,
        "x",
        order=options.sweep_order,
        group_columns=ScaleGrid.resolve(1, columns, options.format.group_rows, options.format.group_size).group_columns,
        whole_groups=options.sweep == "dynamic",
    )


def dense(problem: PlaneProblem, codes: Tensor, snapped: SnappedScales) -> Tensor:
    """Weights `[out, in]` of codes `[out, in]` and scales."""
    grid = problem.grid
    rows = torch.arange(grid.rows) // grid.group_rows
    columns = torch.arange(grid.columns) // grid.group_columns
    signs = code_signs(problem.options.format.bits)[codes.int()]
    values = (signs * snapped.scales()[rows][:, columns]).sum(-1)
    offsets = snapped.offset_values()
    return values if offsets is None else values + offsets[rows][:, columns]


SHAPES: list[dict[str, Any]] = [
    *({"group_size": 8, "refine_rounds": rounds} for rounds in (0, 1)),
    *({"group_size": 60, "row_scale": False, "refine_rounds": rounds} for rounds in (0, 1)),
    {"group_size": "all", "refine_rounds": 1},
    {"group_size": 2, "group_rows": "all", **SHARED},
    {"group_size": 8, "group_rows": "1/8", **SHARED},
    {"group_size": 7, "group_rows": 3, **SHARED},
    {"group_size": 1, "group_rows": 5, **SHARED},
]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("sweep", ["none", "static", "dynamic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_reproduce_the_swept_values(shape: dict[str, Any], sweep: Any, offset: bool) -> None:
    options = solver_options(bits=2, sweep=sweep, offset=offset, **shape)
    weights = random_weights(10, 148)
    problem = PlaneProblem(weights, objective_for(options, 148), options)
    codes, snapped, values = problem._start()
    torch.testing.assert_close(dense(problem, codes.T, snapped), values.T, rtol=1e-4, atol=1e-5)
    started = quadratic_error(weights - values.T, problem.objective.damped)
    codes, snapped = problem.solve()
    assert codes.shape == (10, 148)
    solved = quadratic_error(weights - dense(problem, codes, snapped), problem.objective.damped)
    assert (solved <= started * (1 + 1e-4)).all()
    if options.refine_rounds:
        assert solved.sum() < 0.95 * started.sum()


@pytest.mark.parametrize("row_scale", [False, True])
def test_dynamic_sweep_beats_rounding_and_keeps_its_row_scales(row_scale: bool) -> None:
    weights = random_weights(16, 96)
    errors = {}
    for sweep in ("none", "dynamic"):
        options = solver_options(group_size=16, sweep=sweep, row_scale=row_scale, refine_rounds=0)
        problem = PlaneProblem(weights, objective_for(options, 96), options)
        codes, snapped = problem.solve()
        assert snapped.row_scale.shape == (16 if row_scale else 1,)
        errors[sweep] = quadratic_error(weights - dense(problem, codes, snapped), problem.objective.damped).sum()
    assert errors["dynamic"] < 0.5 * errors["none"]
