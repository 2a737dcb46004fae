"""Errors from a sample of the rows against those of all of them."""

from __future__ import annotations

import pytest
import torch
from bcq_problems import random_hessian, random_weights
from formats import changed, solver_options

from shiftadd_cli.allocation.row_sample import RowSample
from shiftadd_cli.bcq.solver import quantize_matrices

OPTIONS = solver_options(bits=2, group_size=16, refine_rounds=0)


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("massive", [0, 3])
def test_the_sample_estimates_the_error_of_all_rows(with_data: bool, massive: int) -> None:
    """This holds even where a few rows produce nearly all of the output and have much smaller errors."""
    weights = random_weights(1000, 32)
    hessian = random_hessian(32) if with_data else None
    if massive:
        # Rows of two values. Without a rotation, two planes represent them exactly.
        weights[100 : 100 + massive] = 20 * torch.sign(weights[100 : 100 + massive])
    options = changed(OPTIONS, rotation="none")
    options = options if with_data else options.without_data()
    sample = RowSample.of(weights, hessian)
    assert len(sample.rows) == 256
    assert float(sample.factors.sum()) == pytest.approx(1000)
    (full,) = quantize_matrices([weights], ["layer"], hessian, options)
    (sampled,) = quantize_matrices([sample.rows], ["layer"], hessian, options)
    expected = full.output_error if with_data else full.weight_error
    assert expected is not None
    assert sample.relative_error(sampled) == pytest.approx(expected, rel=0.15)
    if massive:
        sampled_error = sampled.output_error if with_data else sampled.weight_error
        assert sampled_error is not None
        assert abs(sampled_error / expected - 1) > 0.5, "the error of the sampled rows alone would be wrong"


def test_small_and_whole_matrices_are_not_sampled() -> None:
    weights, hessian = random_weights(20, 32), random_hessian(32)
    sample = RowSample.of(weights, hessian)
    assert torch.equal(sample.rows, weights)
    (solution,) = quantize_matrices([weights], ["layer"], hessian, OPTIONS)
    assert sample.relative_error(solution) == pytest.approx(solution.output_error, rel=1e-4)
    many = random_weights(300, 32)
    assert torch.equal(RowSample.of(many, hessian, whole=True).rows, many)


def test_a_matrix_of_zeros_has_no_error() -> None:
    weights, hessian = torch.zeros(300, 32), random_hessian(32)
    sample = RowSample.of(weights, hessian)
    (solution,) = quantize_matrices([sample.rows], ["layer"], hessian, OPTIONS)
    assert sample.relative_error(solution) == 0.0
