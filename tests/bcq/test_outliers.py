"""Columns kept at 16 bits: the choice of columns, and the best values beside the planes."""

from __future__ import annotations

import pytest
import torch
from bcq_problems import generator, quadratic_error, random_hessian, random_weights
from formats import changed, solver_options

from shiftadd_cli.bcq.outliers import choose_outliers, corrections, outlier_count, without_columns, without_inputs
from shiftadd_cli.bcq.solver import quantize_matrices


@pytest.mark.parametrize(("columns", "share", "count"), [(576, 0, 0), (576, 0.005, 3), (576, 1e-9, 1), (3, 1.0, 3)])
def test_a_positive_share_gives_at_least_one_column(columns: int, share: float, count: int) -> None:
    assert outlier_count(columns, share) == count


def test_the_columns_that_carry_most_of_all_outputs_are_chosen() -> None:
    first, second = random_weights(4, 12), random_weights(6, 12, seed=1)
    hessian = random_hessian(12)
    power = [float(hessian[k, k]) * float(torch.cat((first, second))[:, k].double().square().sum()) for k in range(12)]
    expected = sorted(sorted(range(12), key=lambda k: -power[k])[:3])
    assert choose_outliers([first, second], hessian, 3).tolist() == expected


def test_removing_columns_sets_their_inputs_to_zero() -> None:
    inputs = torch.randn(50, 8, generator=generator(0))
    ids = torch.tensor([1, 6])
    quiet = inputs.clone()
    quiet[:, ids] = 0
    torch.testing.assert_close(without_inputs(inputs.T @ inputs, ids), quiet.T @ quiet)
    weights = random_weights(3, 8)
    torch.testing.assert_close(weights @ quiet.T, without_columns(weights, ids) @ inputs.T)


def test_corrections_are_the_least_squares_solution_over_the_inputs() -> None:
    inputs = torch.randn(200, 10, generator=generator(2)) @ torch.randn(10, 10, generator=generator(3))
    difference, ids = random_weights(5, 10), torch.tensor([0, 4, 9])
    result = corrections(difference, inputs.T @ inputs / len(inputs), ids)
    outputs = inputs.double() @ difference.double().T
    expected = torch.linalg.lstsq(inputs[:, ids].double(), outputs).solution.T
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-5)


def test_copies_of_one_input_and_dead_inputs_leave_corrections_finite() -> None:
    hessian = torch.ones(4, 4)
    hessian[3] = hessian[:, 3] = 0
    result = corrections(torch.ones(2, 4), hessian, torch.tensor([0, 1, 3]))
    assert torch.isfinite(result).all()
    assert torch.isfinite(corrections(torch.ones(2, 4), torch.zeros(4, 4), torch.tensor([0, 3]))).all()


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("with_data", [False, True])
def test_the_solver_stores_outliers_beside_its_planes(rotation: str, with_data: bool) -> None:
    weights, hessian = [random_weights(12, 64), random_weights(8, 64, seed=1)], random_hessian(64)
    moment = hessian if with_data else None
    plain = solver_options(bits=2, group_size=16, rotation=rotation, refine_rounds=1)
    if not with_data:
        plain = plain.without_data()
    options = changed(plain, outlier_columns=0.05)
    names = ["one", "other"]
    before = quantize_matrices(weights, names, moment, plain)
    after = quantize_matrices(weights, names, moment, options)
    form = hessian if with_data else torch.eye(64)
    for weight, without, beside in zip(weights, before, after, strict=True):
        declared = beside.weight.layout.tensors()
        assert {n: (tuple(t.shape), t.dtype) for n, t in beside.weight.tensors.items()} == declared
        assert beside.weight.layout.nbytes == without.weight.layout.nbytes + 3 * (2 * len(weight) + 4)
        errors = [
            float(quadratic_error(weight - matrix, form).sum() / quadratic_error(weight, form).sum())
            for matrix in (beside.weight.decode(), beside.weight.decode_planes(), without.weight.decode())
        ]
        reported = beside.output_error if with_data else beside.weight_error
        assert reported == pytest.approx(errors[0], rel=1e-3)
        assert errors[0] < errors[1]
        if with_data and rotation == "hadamard":
            # Two of 64 inputs carry much more than the others, and the rotation mixes them with all.
            assert errors[0] < 0.8 * errors[2]
