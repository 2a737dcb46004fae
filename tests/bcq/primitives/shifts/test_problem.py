"""Shift layers are never worse than rounding, and a scaled matrix has a scaled solution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bcq_problems import generator, quadratic_error, quick, random_hessian, random_weights
from formats import solver_options
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.hessian import damp
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.primitives.shifts.levels import MAGNITUDES, shift_levels
from shiftadd_cli.bcq.solver import Solution, quantize_matrices

KINDS = sorted(MAGNITUDES)
PLAIN = {"rotation": "none"}


def options(kind: tuple[str, int], **fields: Any) -> SolverOptions:
    return solver_options(**({"primitive": kind[0], "bits": kind[1]} | fields))


def solve(weights: Tensor, hessian: Tensor | None, settings: SolverOptions) -> Solution:
    settings = settings if hessian is not None else settings.without_data()
    return quantize_matrices([weights], ["layer"], hessian, settings)[0]


def rounded(weights: Tensor, kind: tuple[str, int], scale: Tensor) -> Tensor:
    """Every weight of `[out, in]` on the nearest level at row scales `[out]`, by looking at all levels; float64."""
    levels = shift_levels(*kind).double() * scale.double().unsqueeze(-1)
    nearest = (weights.double().unsqueeze(-1) - levels.unsqueeze(1)).abs().argmin(-1)
    return levels.gather(1, nearest)


@quick
@given(
    kind=st.sampled_from(KINDS),
    columns=st.sampled_from([3, 16, 40]),
    sweep=st.sampled_from(["none", "static", "dynamic"]),
    order=st.sampled_from(["hessian", "natural"]),
    rounds=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_no_row_is_worse_than_rounding_by_its_largest_weight(
    kind: tuple[str, int], columns: int, sweep: Any, order: Any, rounds: int, seed: int
) -> None:
    weights, hessian = random_weights(6, columns, seed), random_hessian(columns, seed)
    settings = options(kind, sweep=sweep, sweep_order=order, refine_rounds=rounds, **PLAIN)
    decoded = solve(weights, hessian, settings).weight.decode()
    form = damp(hessian, settings.weight_error, "layer")
    peak = (weights.abs().amax(1) / shift_levels(*kind)[-1]).bfloat16().float()
    plain = quadratic_error(weights - rounded(weights, kind, peak), form)
    assert (quadratic_error(weights - decoded, form) <= plain * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sweep_and_refinement_lower_the_error_well_below_rounding(kind: tuple[str, int]) -> None:
    weights, hessian = random_weights(24, 64), random_hessian(64)
    fields: list[dict[str, Any]] = [{"sweep": "none", "refine_rounds": 0}, {"refine_rounds": 0}, {}]
    alone, swept, refined = (
        solve(weights, hessian, options(kind, **changes)).output_error or 1.0 for changes in fields
    )
    assert refined < swept < 0.8 * alone


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_levels_are_kept_to_the_bit(kind: tuple[str, int]) -> None:
    g = generator(3)
    codes = torch.randint(0, 2 ** kind[1], (7, 33), generator=g)
    codes[:, 5] = 2 ** kind[1] - 1
    scale = (0.01 + torch.rand(7, generator=g)).bfloat16().float()
    weights = shift_levels(*kind)[codes] * scale.unsqueeze(1)
    assert torch.equal(solve(weights, None, options(kind, **PLAIN)).weight.decode(), weights)
    assert torch.equal(solve(weights, random_hessian(33), options(kind, **PLAIN)).weight.decode(), weights)


@quick
@given(kind=st.sampled_from(KINDS), exponents=st.lists(st.integers(-90, 36), min_size=5, max_size=5))
def test_rows_scaled_by_powers_of_two_are_solved_alike(kind: tuple[str, int], exponents: list[int]) -> None:
    weights, hessian = random_weights(5, 24), random_hessian(24)
    factor = torch.exp2(torch.tensor(exponents, dtype=torch.float32)).unsqueeze(1)
    first = solve(weights, hessian, options(kind, **PLAIN)).weight
    other = solve(weights * factor, hessian, options(kind, **PLAIN)).weight
    assert torch.equal(other.tensors["weight_codes"], first.tensors["weight_codes"])
    assert torch.equal(other.decode(), first.decode() * factor)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_above_one_are_not_clipped(kind: tuple[str, int]) -> None:
    """DeepShift's rule clips them: sign · 2 ^ round(log2 |w|) with the exponent at most 0."""
    weights = 300 * random_weights(6, 48)
    deepshift = weights.sign() * torch.exp2(weights.abs().log2().round().clamp(-14, 0))
    clipped = float((weights - deepshift).square().sum() / weights.square().sum())
    error = solve(weights, None, options(kind)).weight_error
    assert error < 0.16 < 0.8 < clipped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_rows_of_zeros_and_of_extreme_numbers_stay_finite(kind: tuple[str, int], calibrated: bool) -> None:
    weights = random_weights(6, 32)
    weights[1] = 0.0
    weights[2] *= 1e-41
    weights[3] *= 1e12
    weights[4, 1:] = 0.0
    hessian = random_hessian(32) if calibrated else None
    decoded = solve(weights, hessian, options(kind, **PLAIN)).weight.decode()
    assert torch.isfinite(decoded).all()
    assert (decoded[1] == 0).all()
    assert (decoded[2].abs() < 1e-40).all()
    assert float((decoded[3] - weights[3]).norm() / weights[3].norm()) < 0.9


def test_a_layer_of_pruned_weights_keeps_its_zeros() -> None:
    weights = random_weights(8, 64)
    weights[weights.abs() < weights.abs().median()] = 0.0
    decoded = solve(weights, None, options(("shift1", 4), **PLAIN)).weight.decode()
    assert ((weights == 0) <= (decoded == 0)).all()


@pytest.mark.parametrize("outlier_columns", [0.0, 0.1])
@pytest.mark.parametrize("asymmetric", [0.0, 1.0])
def test_rotation_outliers_and_asymmetry_work_as_for_planes(outlier_columns: float, asymmetric: float) -> None:
    weights, hessian = random_weights(12, 40), random_hessian(40)
    settings = options(("shift2", 4), outlier_columns=outlier_columns, asymmetric=asymmetric)
    cross = hessian + 0.01 * random_hessian(40, 7)
    solutions = quantize_matrices([weights[:5], weights[5:]], ["a", "b"], hessian, settings, cross)
    stored = [solution.weight.tensors for solution in solutions]
    assert all(("weight_columns" in tensors) == (outlier_columns > 0) for tensors in stored)
    assert all("weight_signs" in tensors and "weight_exponents" not in tensors for tensors in stored)
    assert all((solution.output_error or 1.0) < 0.05 for solution in solutions)
    # The matrices of one input are solved as one problem with independent rows.
    if not asymmetric and not outlier_columns:
        alone = quantize_matrices([weights], ["a"], hessian, settings)[0]
        together = torch.cat([solution.weight.decode() for solution in solutions])
        torch.testing.assert_close(alone.weight.decode(), together)
