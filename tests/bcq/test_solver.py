from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from bcq_problems import generator, quadratic_error, random_hessian, random_weights
from formats import changed, solver_options
from torch import Tensor

from shiftadd_cli.bcq import solver
from shiftadd_cli.bcq.solver import Solution, SolverOptions, quantize_matrices
from shiftadd_cli.errors import NumericalError

FORMATS = ("pot", "apot2", "apot3", "float")
ACC: dict[str, Any] = {
    "group_size": 1,
    "group_rows": "all",
    "scale_format": "apot3",
    "row_scale": False,
    "offset": False,
    "fit": "greedy",
    "sweep": "dynamic",
    "refine_rounds": 0,
    "rotation": "none",
}
LAT: dict[str, Any] = {**ACC, "group_size": 8, "group_rows": "1/8"}
QUICK = solver_options(group_size=16, refine_rounds=1, offset=False)


def solve(weights: Tensor, hessian: Tensor | None, options: SolverOptions) -> Solution:
    (solution,) = quantize_matrices([weights], ["layer"], hessian, options)
    check_layout(solution)
    return solution


def check_layout(solution: Solution) -> None:
    declared = solution.weight.layout.tensors()
    assert {n: (tuple(t.shape), t.dtype) for n, t in solution.weight.tensors.items()} == declared
    assert torch.isfinite(solution.weight.decode()).all()


def relative_errors(weights: Tensor, solution: Solution, hessian: Tensor) -> tuple[float, float]:
    """Weight and output error in float64, from the decoded tensors."""
    difference = weights.double() - solution.weight.decode().double()
    output = quadratic_error(difference, hessian).sum() / quadratic_error(weights, hessian).sum()
    return float(difference.square().sum() / weights.double().square().sum()), float(output)


def objective_value(weights: Tensor, solution: Solution, hessian: Tensor, options: SolverOptions) -> float:
    """tr[(W − Ŵ)(H + λI)(W − Ŵ)ᵀ], float64."""
    form = hessian.double() + options.weight_error * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    return float(quadratic_error(weights - solution.weight.decode(), form).sum())


def same_bytes(one: Solution, other: Solution) -> bool:
    return all(torch.equal(t, other.weight.tensors[name]) for name, t in one.weight.tensors.items())


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("sweep", ["none", "static", "dynamic"])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_every_combination_improves_on_its_fit_alone(scale_format: str, sweep: Any, offset: bool) -> None:
    weights, hessian = random_weights(12, 72), random_hessian(72)
    options = changed(QUICK, scale_format=scale_format, sweep=sweep, offset=offset)
    full = solve(weights, hessian, options)
    swept = solve(weights, hessian, changed(options, refine_rounds=0))
    fitted = solve(weights, hessian, options.without_data())
    errors = [objective_value(weights, solution, hessian, options) for solution in (full, swept, fitted)]
    assert errors[0] < 0.95 * errors[1]
    assert errors[0] < 0.6 * errors[2]
    if sweep != "none":
        assert errors[1] < errors[2]


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("hessian", [None, random_hessian(40)], ids=["no data", "data"])
def test_reported_errors_are_those_of_the_stored_tensors(scale_format: str, hessian: Tensor | None) -> None:
    weights = random_weights(9, 40)
    options = changed(QUICK, scale_format=scale_format)
    solution = solve(weights, hessian, options if hessian is not None else options.without_data())
    weight_error, output_error = relative_errors(weights, solution, random_hessian(40))
    assert solution.weight_error == pytest.approx(weight_error, rel=1e-3)
    if hessian is None:
        assert solution.output_error is None
    else:
        assert solution.output_error == pytest.approx(output_error, rel=1e-3)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("hessian", [None, random_hessian(48)], ids=["no data", "data"])
def test_stored_tensors_represent_the_weights_with_or_without_rotation(rotation: Any, hessian: Tensor | None) -> None:
    weights = random_weights(9, 48)
    options = changed(QUICK, bits=6, rotation=rotation)
    solution = solve(weights, hessian, options if hessian is not None else options.without_data())
    assert ("weight_signs" in solution.weight.tensors) == (rotation == "hadamard")
    torch.testing.assert_close(solution.weight.decode(), weights, rtol=0, atol=0.15 * float(weights.abs().max()))
    assert solution.weight_error < 0.003


def test_rotation_spreads_outliers() -> None:
    weights, hessian = random_weights(16, 64), random_hessian(64)
    # Heavy tails: a few weights in every group are many times the others.
    weights *= torch.exp(1.5 * torch.randn(weights.shape, generator=generator(1)))
    options = changed(QUICK, group_size="all")
    plain, rotated = (solve(weights, hessian, changed(options, rotation=rotation)) for rotation in ("none", "hadamard"))
    assert objective_value(weights, rotated, hessian, options) < 0.7 * objective_value(weights, plain, hessian, options)


def test_the_seed_chooses_the_signs() -> None:
    weights, hessian = random_weights(4, 32), random_hessian(32)
    signs = [solve(weights, hessian, changed(QUICK, seed=seed)).weight.tensors["weight_signs"] for seed in (0, 0, 1)]
    assert torch.equal(signs[0], signs[1])
    assert not torch.equal(signs[0], signs[2])


@pytest.mark.parametrize("options", [QUICK, changed(QUICK, row_scale=False), solver_options(**ACC)], ids=str)
def test_matrices_solved_together_equal_those_solved_alone(options: SolverOptions) -> None:
    matrices = [random_weights(rows, 48, seed=rows) for rows in (7, 1, 12)]
    hessian = random_hessian(48)
    together = quantize_matrices(matrices, ["q", "k", "v"], hessian, options)
    for matrix, solution in zip(matrices, together, strict=True):
        check_layout(solution)
        alone = solve(matrix, hessian, options)
        # The order of sums in a matrix product depends on its size; a weight on a midpoint may then fall either way.
        same = (solution.weight.decode() - alone.weight.decode()).abs().amax(-1) < 1e-5
        assert same.float().mean() >= 0.7
        assert solution.output_error == pytest.approx(alone.output_error, rel=0.05)


def test_pieces_of_rows_are_put_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "_PIECE_ROWS", 4)
    matrices = [random_weights(rows, 32, seed=rows) for rows in (7, 3, 9)]
    for solution in quantize_matrices(matrices, ["q", "k", "v"], random_hessian(32), changed(QUICK, offset=True)):
        check_layout(solution)
        assert solution.output_error is not None
        assert solution.output_error < 0.05


@pytest.mark.parametrize(
    "options", [QUICK, changed(QUICK, offset=True, sweep="dynamic"), solver_options(**LAT)], ids=str
)
def test_two_runs_give_the_same_bytes_whatever_the_memory_order(options: SolverOptions) -> None:
    weights, hessian = random_weights(11, 50), random_hessian(50)
    first = solve(weights, hessian, options)
    assert same_bytes(first, solve(weights.clone(), hessian.clone(), options))
    assert same_bytes(first, solve(weights.T.contiguous().T, hessian, options))


def test_inputs_are_not_changed() -> None:
    weights, hessian = random_weights(6, 30), random_hessian(30)
    before = weights.clone(), hessian.clone()
    for options in (QUICK, solver_options(**LAT)):
        solve(weights, hessian, options)
    assert torch.equal(weights, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_type_are_accepted(dtype: torch.dtype) -> None:
    weights, hessian = random_weights(6, 30), random_hessian(30)
    solution = solve(weights.to(dtype), hessian.double(), QUICK)
    assert relative_errors(weights, solution, hessian)[1] < 0.05


@pytest.mark.parametrize("fit_rounds", [0, 1, 4])
@pytest.mark.parametrize("refine_rounds", [1, 3])
def test_refinement_never_raises_the_objective(refine_rounds: int, fit_rounds: int) -> None:
    for seed in range(4):
        weights, hessian = random_weights(8, 60, seed), random_hessian(60, seed)
        options = changed(QUICK, refine_rounds=refine_rounds, fit_rounds=fit_rounds, bits=2, scale_format="pot")
        refined = objective_value(weights, solve(weights, hessian, options), hessian, options)
        plain = objective_value(weights, solve(weights, hessian, changed(options, refine_rounds=0)), hessian, options)
        assert refined <= plain * (1 + 1e-4)


def test_more_bits_have_less_error() -> None:
    weights, hessian = random_weights(6, 40), random_hessian(40)
    errors = [solve(weights, hessian, changed(QUICK, bits=bits, offset=True)).output_error for bits in range(1, 9)]
    for fewer, more in itertools.pairwise(errors):
        assert fewer is not None
        assert more is not None
        assert more < 0.8 * fewer
    assert errors[-1] is not None
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("recipe", [ACC, LAT, {**LAT, "group_rows": 3, "group_size": 5}], ids=["acc", "lat", "3x5"])
@pytest.mark.parametrize(("out", "columns"), [(10, 13), (1, 1), (3, 130), (17, 64)])
def test_shared_scales_of_the_paper_improve_with_data(recipe: dict[str, Any], out: int, columns: int) -> None:
    weights, hessian = random_weights(out, columns), random_hessian(columns)
    options = solver_options(**recipe)
    swept = solve(weights, hessian, options)
    assert swept.output_error is not None
    weight_error, output_error = relative_errors(weights, swept, hessian)
    assert swept.weight_error == pytest.approx(weight_error, rel=1e-3, abs=1e-9)
    assert swept.output_error == pytest.approx(output_error, rel=1e-3, abs=1e-9)
    fitted = solve(weights, hessian, options.without_data())
    if columns > 1:
        assert output_error < relative_errors(weights, fitted, hessian)[1]


EDGE_OPTIONS = [
    *(changed(QUICK, scale_format=name, offset=offset) for name in FORMATS for offset in (False, True)),
    changed(QUICK, bits=1, offset=True),
    changed(QUICK, bits=8),
    changed(QUICK, row_scale=False, sweep="dynamic"),
    solver_options(**ACC),
    solver_options(**LAT),
]


@pytest.mark.parametrize("options", EDGE_OPTIONS, ids=str)
def test_zeros_stay_zero(options: SolverOptions) -> None:
    hessian = random_hessian(20)
    nothing = solve(torch.zeros(6, 20), hessian, options)
    assert not nothing.weight.decode().any()
    assert (nothing.weight_error, nothing.output_error) == (0.0, 0.0)
    weights = random_weights(6, 20)
    weights[2] = 0.0
    if options.format.group_rows == 1:
        decoded = solve(weights, hessian, options).weight.decode()
        assert not decoded[2].any()


@pytest.mark.parametrize("options", EDGE_OPTIONS, ids=str)
def test_a_single_weight_is_kept(options: SolverOptions) -> None:
    solution = solve(torch.tensor([[-0.3]]), torch.tensor([[2.0]]), options)
    # Without a row scale one power of two takes its place, and the scales must make up the rest.
    tolerance = 0.3 if options.format.scale_format == "pot" and not options.format.row_scale else 0.06
    assert float(solution.weight.decode()) == pytest.approx(-0.3, rel=tolerance)


@pytest.mark.parametrize("options", EDGE_OPTIONS, ids=str)
def test_constant_rows_and_large_means_survive_an_offset(options: SolverOptions) -> None:
    weights = torch.full((4, 32), 0.7)
    weights[1] = -0.1
    weights[2:] += 0.2 * torch.randn(2, 32, generator=generator(0))
    # The rotation would turn a constant into spikes, but this test is about the offset.
    solution = solve(weights, torch.eye(32), changed(options, rotation="none"))
    decoded = solution.weight.decode()
    if options.format.bits > 1 and options.format.group_rows == 1:
        torch.testing.assert_close(decoded[:2], weights[:2], rtol=0.06, atol=0)
    assert solution.weight_error < (0.05 if options.format.bits > 1 else 0.3)


@pytest.mark.parametrize("options", EDGE_OPTIONS, ids=str)
def test_dead_inputs_do_no_harm(options: SolverOptions) -> None:
    weights, hessian = random_weights(8, 40), random_hessian(40)
    dead = [0, 5, 17, 18, 39]
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    solution = solve(weights, hessian, options)
    assert solution.output_error is not None
    assert solution.output_error < (0.15 if options.format.bits > 1 else 0.5)
    # Only the weight error constrains their weights, and it keeps them close.
    assert solution.weight.decode().abs().max() < 3 * weights.abs().max()


@pytest.mark.parametrize("options", EDGE_OPTIONS, ids=str)
def test_inputs_that_never_fired_leave_only_the_weight_error(options: SolverOptions) -> None:
    weights = random_weights(8, 40)
    solution = solve(weights, torch.zeros(40, 40), options)
    assert solution.output_error == 0.0
    plain = solve(weights, None, options.without_data())
    assert solution.weight_error <= plain.weight_error * 1.05 + 1e-6


@pytest.mark.parametrize("smallest", [-1e-5, -0.05])
def test_an_indefinite_hessian_is_handled(smallest: float) -> None:
    weights, hessian = random_weights(8, 40), random_hessian(40)
    values, vectors = torch.linalg.eigh(hessian.double())
    values[0] = smallest * float(values.mean())
    bad = ((vectors * values) @ vectors.T).float()
    for sweep in ("none", "static", "dynamic"):
        options = changed(QUICK, weight_error=0.0, sweep=sweep)
        solution = solve(weights, bad, options)
        assert relative_errors(weights, solution, hessian)[1] < 0.05
        assert solution.weight_error < 1.0


@pytest.mark.parametrize("exponent", [-30, -12, 12, 30])
def test_units_of_weights_and_inputs_do_not_matter(exponent: int) -> None:
    weights, hessian = random_weights(6, 40), random_hessian(40)
    # A power of two changes no digit.
    reference = solve(weights, hessian, changed(QUICK, offset=True)).weight.decode()
    scaled = solve(weights * 2.0**exponent, hessian, changed(QUICK, offset=True)).weight.decode()
    torch.testing.assert_close(scaled * 2.0**-exponent, reference, rtol=1e-3, atol=1e-5)
    stronger = solve(weights, hessian * 2.0**exponent, changed(QUICK, offset=True)).weight.decode()
    torch.testing.assert_close(stronger, reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e20])
def test_broken_weights_are_refused_by_name(value: float) -> None:
    good, bad = random_weights(4, 16), random_weights(4, 16)
    bad[1, 2] = value
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.k_proj.*damaged"):
        quantize_matrices([good, bad], ["model.layers.0.q_proj", "model.layers.0.k_proj"], None, QUICK.without_data())


def test_broken_inputs_are_refused_by_name() -> None:
    hessian = random_hessian(16)
    hessian[3, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.q_proj.*not finite"):
        quantize_matrices([random_weights(4, 16)], ["model.layers.0.q_proj"], hessian, QUICK)
