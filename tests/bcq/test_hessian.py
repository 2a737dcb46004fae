from __future__ import annotations

import pytest
import torch
from bcq_problems import generator, random_hessian, random_weights
from torch import Tensor

from shiftadd_cli.bcq.hessian import build_objective, column_order, corrected_target, damp, factorise
from shiftadd_cli.errors import NumericalError


def with_eigenvalue(hessian: Tensor, value: float) -> Tensor:
    """The same form with its smallest eigenvalue replaced."""
    values, vectors = torch.linalg.eigh(hessian.double())
    values[0] = value
    form = (vectors * values) @ vectors.T
    return ((form + form.T) / 2).float()


def check_factor(form: Tensor, order: Tensor, factor: Tensor, tolerance: float = 1e-3) -> None:
    """U upper triangular with a positive diagonal, and UᵀU times the permuted form is the identity, in float64."""
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    u = factor.double()
    product = u.T @ u @ form.double()[order][:, order]
    assert (product - torch.eye(len(order), dtype=torch.float64)).abs().max() < tolerance


@pytest.mark.parametrize("columns", [1, 2, 13, 150])
@pytest.mark.parametrize("order", ["hessian", "natural"])
def test_the_factor_inverts_the_form(columns: int, order: str) -> None:
    hessian = random_hessian(columns)
    objective = build_objective(hessian, 0.01, "x", order=order, group_columns=8, whole_groups=False)
    check_factor(objective.damped, objective.order, objective.inverse_factor)
    expected = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    torch.testing.assert_close(objective.damped, expected)


def test_factor_agrees_with_the_cholesky_of_the_inverse() -> None:
    hessian = random_hessian(40)
    form, factor = factorise(damp(hessian, 0.01, "x"), torch.arange(40), "x")
    expected = torch.linalg.cholesky(torch.linalg.inv(form.double()), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-4)


def test_dead_inputs_get_the_weight_error_alone() -> None:
    hessian = random_hessian(30)
    hessian[[3, 7]] = 0.0
    hessian[:, [3, 7]] = 0.0
    damped = damp(hessian, 0.01, "x")
    mean = hessian.diagonal().mean()
    assert damped[3, 3] == damped[7, 7]
    torch.testing.assert_close(damped[3, 3], 0.01 * mean)
    check_factor(*_factorised(damped))


def _factorised(damped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.arange(len(damped))
    form, factor = factorise(damped, order, "x")
    return form, order, factor


def test_inputs_that_never_fired_leave_the_weight_error() -> None:
    objective = build_objective(torch.zeros(5, 5), 0.01, "x", order="hessian", group_columns=2, whole_groups=False)
    torch.testing.assert_close(objective.damped, 0.01 * torch.eye(5))
    check_factor(objective.damped, objective.order, objective.inverse_factor)


@pytest.mark.parametrize("weight_error", [0.0, 0.01])
def test_one_sample_is_enough_to_factorise(weight_error: float) -> None:
    hessian = random_hessian(20, samples=1)
    objective = build_objective(hessian, weight_error, "x", order="hessian", group_columns=4, whole_groups=False)
    # A condition of 20 million leaves few digits in float32, but the diagonal bounds the loss.
    check_factor(objective.damped, objective.order, objective.inverse_factor, 1e-3 if weight_error else 2.0)


@pytest.mark.parametrize("smallest", [-1e-4, -0.02, -0.5])
def test_an_indefinite_form_is_damped_until_it_is_positive_definite(smallest: float) -> None:
    hessian = random_hessian(24)
    mean = float(hessian.diagonal().mean())
    bad = with_eigenvalue(hessian, smallest * mean)
    objective = build_objective(bad, 0.0, "x", order="natural", group_columns=4, whole_groups=False)
    assert float(torch.linalg.eigvalsh(objective.damped.double())[0]) > 0
    check_factor(objective.damped, objective.order, objective.inverse_factor, 0.1)
    # The objective is the factorised form: the original plus a multiple of the identity, no more than needed.
    extra = objective.damped - bad
    torch.testing.assert_close(extra, extra[0, 0] * torch.eye(24), rtol=1e-3, atol=1e-5 * mean)
    assert abs(smallest) * mean < float(extra[0, 0]) < 20 * abs(smallest) * mean


def test_a_hopeless_form_is_refused_by_name() -> None:
    hessian = with_eigenvalue(random_hessian(24), -1000.0)
    with pytest.raises(NumericalError, match=r"model\.layers\.3\.mlp.*factorised"):
        build_objective(hessian, 0.01, "model.layers.3.mlp", order="natural", group_columns=4, whole_groups=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_inputs_that_are_not_finite_are_refused_by_name(value: float) -> None:
    hessian = random_hessian(8)
    hessian[2, 5] = value
    with pytest.raises(NumericalError, match=r"model\.layers\.3\.mlp.*not finite"):
        build_objective(hessian, 0.01, "model.layers.3.mlp", order="hessian", group_columns=4, whole_groups=False)


def test_orders_sort_columns_or_groups() -> None:
    diagonal = torch.tensor([1.0, 5.0, 3.0, 0.0, 9.0, 2.0, 20.0])
    assert column_order(diagonal, 3, "natural", whole_groups=True).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert column_order(diagonal, 3, "hessian", whole_groups=False).tolist() == [6, 4, 1, 2, 5, 0, 3]
    # Groups of three: sums 9, 11 and 20; the last has one column.
    assert column_order(diagonal, 3, "hessian", whole_groups=True).tolist() == [6, 3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize("whole_groups", [False, True])
@pytest.mark.parametrize("width", [1, 4, 7, 100])
def test_orders_are_permutations_and_ties_keep_their_order(whole_groups: bool, width: int) -> None:
    diagonal = torch.randint(0, 3, (45,), generator=generator(0)).float()
    order = column_order(diagonal, width, "hessian", whole_groups)
    assert sorted(order.tolist()) == list(range(45))
    if whole_groups:
        groups = (order // width).tolist()
        assert len([g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g]) == -(-45 // width)
    else:
        assert order.tolist() == sorted(range(45), key=lambda c: -float(diagonal[c]))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_corrected_target_minimises_the_distance_from_the_original_output(strength: float) -> None:
    g = generator(4)
    weights = torch.randn(6, 20, generator=g, dtype=torch.float64)
    original = torch.randn(200, 20, generator=g, dtype=torch.float64)
    current = original + 0.3 * torch.randn(200, 20, generator=g, dtype=torch.float64)
    hessian, cross = current.T @ current / 200, original.T @ current / 200
    target = corrected_target(weights, hessian, cross, 0.05, strength, "layer")
    ridge = 0.05 * float(hessian.diagonal().mean())
    # This is one least-squares problem: the outputs of the original, and a pull towards the weights.
    rows = torch.cat((current / 200**0.5, ridge**0.5 * torch.eye(20, dtype=torch.float64)))
    goal = torch.cat((original @ weights.T / 200**0.5, ridge**0.5 * weights.T))
    best = torch.linalg.lstsq(rows, goal).solution.T
    torch.testing.assert_close(target, weights + strength * (best - weights))


def test_without_drift_the_target_is_the_weight_itself() -> None:
    weights, hessian = random_weights(5, 24), random_hessian(24)
    torch.testing.assert_close(corrected_target(weights, hessian, hessian, 0.01, 1.0, "layer"), weights)
