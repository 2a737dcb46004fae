from __future__ import annotations

import pytest
import torch
from bcq_problems import generator, quadratic_error, quick, random_hessian, random_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.descent import descend_codes
from shiftadd_cli.bcq.levels import LevelTable
from shiftadd_cli.bcq.ranks import nearest_ranks, values_of


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
def test_never_raises_the_objective(out: int, columns: int, width: int, bits: int, passes: int, seed: int) -> None:
    weights, hessian, tables = problem(out, columns, width, bits, seed)
    start = torch.randint(0, 2**bits, (columns, out), generator=generator(seed)).to(torch.uint8)
    untouched = start.clone()
    ranks, values = descend_codes(weights, hessian, tables, width, start, passes)
    assert torch.equal(start, untouched)
    assert ranks.dtype == torch.uint8
    assert torch.equal(values, values_of(tables, width, ranks))
    before = quadratic_error((weights - values_of(tables, width, start)).T, hessian)
    after = quadratic_error((weights - values).T, hessian)
    assert (after <= before * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize(("columns", "width", "bits"), [(1, 1, 2), (20, 7, 3), (150, 64, 2), (300, 100, 1), (20, 8, 5)])
def test_at_rest_no_single_weight_can_be_better(columns: int, width: int, bits: int) -> None:
    weights, hessian, tables = problem(3, columns, width, bits)
    start, rounded = nearest_ranks(weights, tables, width)
    ranks, values = descend_codes(weights, hessian, tables, width, start, 200)
    again, _ = descend_codes(weights, hessian, tables, width, ranks, 1)
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


def test_blocks_do_not_show() -> None:
    # One pass over 300 columns, against a pass that refreshes the whole gradient after every single weight.
    weights, hessian, tables = problem(4, 300, 50, 3)
    start, values = nearest_ranks(weights, tables, 50)
    _, found = descend_codes(weights, hessian, tables, 50, start, 1)
    expected, form = values.double(), hessian.double()
    for column in range(300):
        goal = expected[column] + (form[column] @ (weights.double() - expected)) / form[column, column]
        levels = tables.levels[:, column // 50].double()
        expected[column] = levels.gather(0, (levels - goal).abs().argmin(0, keepdim=True)).squeeze(0)
    same = ((found.double() - expected).abs() < 1e-6).all(0)
    assert same.float().mean() >= 0.5
    ratio = quadratic_error((weights - found).T, form).sum() / quadratic_error((weights - expected).T, form).sum()
    assert abs(float(ratio) - 1) < 0.01


def test_diagonal_hessian_gives_nearest_levels_in_one_pass() -> None:
    weights, _, tables = problem(5, 60, 20, 3)
    start = torch.randint(0, 8, (60, 5), generator=generator(1)).to(torch.uint8)
    hessian = torch.diag(torch.rand(60, generator=generator(2)) + 0.1)
    _, values = descend_codes(weights, hessian, tables, 20, start, 1)
    _, nearest = nearest_ranks(weights, tables, 20)
    torch.testing.assert_close((weights - values).abs(), (weights - nearest).abs(), rtol=0, atol=1e-6)
