"""Trellis-coded planes: their error beside that of plain planes, and what the solver promises."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from bcq_problems import generator, quadratic_error, quick, random_hessian, random_weights
from formats import solver_options
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.choices import CODE_BITS, Primitive
from shiftadd_cli.bcq.hessian import damp
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.solver import Solution, quantize_matrices

NAMES: tuple[Primitive, ...] = ("trellis1", "trellis2")
KINDS = [(name, bits) for name in NAMES for bits in CODE_BITS[name]]
PLAIN = {"rotation": "none", "group_size": "all", "scale_format": "apot3"}


def options(kind: tuple[Primitive, int], **fields: Any) -> SolverOptions:
    return solver_options(**({"primitive": kind[0], "bits": kind[1]} | PLAIN | fields))


def solve(weights: Tensor, hessian: Tensor | None, settings: SolverOptions) -> Solution:
    settings = settings if hessian is not None else settings.without_data()
    return quantize_matrices([weights], ["layer"], hessian, settings)[0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gaussian_weights_lose_much_less_than_in_plain_planes(kind: tuple[Primitive, int]) -> None:
    """Relative errors of the best scalar quantizers are .3634, .1175 and .0345; of any code, .25, .0625 and .0156."""
    weights = torch.randn(256, 64, generator=generator(0))
    error = solve(weights, None, options(kind)).weight_error
    scalar = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}[kind[1]]
    assert 4.0 ** -kind[1] < error < 0.85 * scalar


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sweep_and_refinement_lower_the_error(kind: tuple[Primitive, int]) -> None:
    weights, hessian = random_weights(96, 64), random_hessian(64)
    fields: list[dict[str, Any]] = [{"sweep": "none", "refine_rounds": 0}, {"refine_rounds": 0}, {}]
    alone, swept, refined = (
        solve(weights, hessian, options(kind, **changes)).output_error or 1.0 for changes in fields
    )
    assert refined < swept < 0.9 * alone


@quick
@given(
    kind=st.sampled_from(KINDS),
    rows=st.sampled_from([1, 5, 40, 300]),
    columns=st.sampled_from([3, 16, 40]),
    sweep=st.sampled_from(["none", "static", "dynamic"]),
    group_size=st.sampled_from(["all", 8, 12]),
    scale_format=st.sampled_from(["pot", "apot2", "apot3", "float"]),
    offset=st.booleans(),
    row_scale=st.booleans(),
    rotation=st.sampled_from(["none", "hadamard"]),
    outlier_columns=st.sampled_from([0.0, 0.1]),
    rounds=st.integers(0, 2),
)
def test_all_options_give_errors_of_the_stored_matrix(
    kind: tuple[Primitive, int], rows: int, columns: int, rounds: int, **fields: Any
) -> None:
    weights, hessian = random_weights(rows, columns), random_hessian(columns)
    settings = options(kind, refine_rounds=rounds, **fields)
    solution = solve(weights, hessian, settings)
    decoded = solution.weight.decode()
    assert decoded.shape == weights.shape
    assert {name: (tuple(t.shape), t.dtype) for name, t in solution.weight.tensors.items()} == (
        solution.weight.layout.tensors()
    )
    expected = quadratic_error(weights - decoded, hessian).sum() / quadratic_error(weights, hessian).sum()
    assert solution.output_error == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("group_rows", ["all", "1/3", 4])
def test_rows_may_share_scales(group_rows: int | str) -> None:
    fields: dict[str, Any] = {"group_rows": group_rows, "row_scale": False, "refine_rounds": 0, "group_size": 16}
    weights, hessian = random_weights(40, 48), random_hessian(48)
    solution = solve(weights, hessian, options(("trellis1", 3), **fields))
    assert solution.output_error is not None
    assert solution.output_error < 0.2


def test_refinement_keeps_the_best_of_every_stripe() -> None:
    weights, hessian = random_weights(600, 32), random_hessian(32)
    form = damp(hessian, 0.01, "layer")
    errors = []
    for rounds in range(3):
        settings = options(("trellis2", 2), refine_rounds=rounds, weight_error=0.01)
        decoded = solve(weights, hessian, settings).weight.decode()
        errors.append([part.sum() for part in quadratic_error(weights - decoded, form).split(256)])
    for before, after in itertools.pairwise(errors):
        assert all(later <= earlier * (1 + 1e-4) for earlier, later in zip(before, after, strict=True))


def test_stripes_are_solved_alike_in_any_matrix() -> None:
    weights, hessian = random_weights(700, 32), random_hessian(32)
    together = solve(weights, hessian, options(("trellis1", 2))).weight
    alone = solve(weights[256:512].contiguous(), hessian, options(("trellis1", 2))).weight
    assert torch.equal(together.tensors["weight_codes"][256:512], alone.tensors["weight_codes"])
    both = quantize_matrices([weights[:256], weights[256:512]], ["a", "b"], hessian, options(("trellis1", 2)))
    assert torch.equal(both[1].weight.tensors["weight_codes"], alone.tensors["weight_codes"])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_matrices_of_zeros_stay_finite(kind: tuple[Primitive, int]) -> None:
    weights = torch.zeros(70, 16)
    assert solve(weights, random_hessian(16), options(kind)).weight.decode().abs().max() < 1e-9
