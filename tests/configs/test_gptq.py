"""The recipe `gptq` compared with GPTQ as its paper and code define it, column by column in float64."""

from __future__ import annotations

import pytest
import torch
from bcq_problems import generator, quadratic_error, random_hessian, random_weights
from formats import changed
from torch import Tensor

from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.solver import quantize_matrices
from shiftadd_cli.recipe import Recipe

DAMPING = 0.01


def reference(weights: Tensor, hessian: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Weights `[out, in]` as GPTQ decodes them, and the distance of each row from its nearest tie, in steps `[out]`.

    In float64, with act_order, static_groups and an asymmetric grid with an integer zero point. The inverse Hessian is
    updated by eliminating one column after another.
    """
    w, form = weights.double().clone(), hessian.double().clone()
    rows, columns = w.shape
    grids = [grid(weights[:, start : start + group_size].double(), bits) for start in range(0, columns, group_size)]
    order = torch.argsort(form.diagonal(), descending=True, stable=True)
    form += DAMPING * form.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(form)
    decoded = torch.empty_like(w)
    nearest_tie = torch.full((rows,), torch.inf, dtype=torch.float64)
    for j in order.tolist():
        step, zero = grids[j // group_size]
        level = w[:, j] / step + zero
        code = level.round().clamp(0, 2**bits - 1)
        decoded[:, j] = step * (code - zero)
        inside = (level > 0) & (level < 2**bits - 1)
        tie = (level - level.floor() - 0.5).abs()
        nearest_tie = torch.where(inside, torch.minimum(nearest_tie, tie), nearest_tie)
        error = (w[:, j] - decoded[:, j]) / inverse[j, j]
        w -= error.unsqueeze(1) * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        # Rounding errors in an eliminated column must not come back.
        inverse[j], inverse[:, j], inverse[j, j] = 0.0, 0.0, 1.0
    return decoded, nearest_tie


def grid(group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and integer zero point `[out]` of the min-max grid over a group `[out, columns]`, which includes zero."""
    low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
    step = (high - low) / (2**bits - 1)
    return step, (-low / step).round()


def on_half_precision_grids(rows: int, columns: int, group_size: int, bits: int) -> Tensor:
    """Random weights whose min-max grids are exact in float16: steps have five bits, and ends lie on levels."""
    g = generator(columns + bits)
    top = 2**bits - 1
    weights = random_weights(rows, columns, seed=bits)
    for start in range(0, columns, group_size):
        group = weights[:, start : start + group_size]
        step = torch.randint(16, 32, (rows, 1), generator=g) * 2.0**-10
        zero = torch.randint(0, top + 1, (rows, 1), generator=g)
        spread = group / group.abs().amax(1, keepdim=True) * top
        group.copy_((spread * step).clamp(-zero * step, (top - zero) * step))
        group[:, :1] = -zero * step
        group[:, -1:] = (top - zero) * step
    return weights


def options(bits: int, group_size: int) -> SolverOptions:
    return Recipe.load("gptq", {"bits": bits, "group_size": group_size}).solver_options


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 64), (96, 32), (150, 40), (200, 128)])
def test_decoded_weights_equal_those_of_gptq(columns: int, group_size: int, bits: int) -> None:
    weights, hessian = on_half_precision_grids(40, columns, group_size, bits), random_hessian(columns, seed=bits)
    expected, nearest_tie = reference(weights, hessian, bits, group_size)
    (solution,) = quantize_matrices([weights], ["x"], hessian, options(bits, group_size))
    # In float32, a weight this close to a tie may round the other way, and then the rest of its row differs too.
    clear = nearest_tie > 2e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(solution.weight.decode().double()[clear], expected[clear])


@pytest.mark.parametrize("change", [{"sweep_order": "natural"}, {"sweep": "none"}, {"weight_error": 0.1}])
def test_other_settings_differ_from_the_reference(change: dict[str, object]) -> None:
    weights, hessian = on_half_precision_grids(40, 96, 32, 3), random_hessian(96, seed=3)
    expected, _ = reference(weights, hessian, 3, 32)
    (solution,) = quantize_matrices([weights], ["x"], hessian, changed(options(3, 32), **change))
    same = (solution.weight.decode().double() == expected).all(1)
    assert same.float().mean() < 0.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_half_precision_scales_cost_almost_nothing(bits: int) -> None:
    weights, hessian = random_weights(60, 150, seed=bits), random_hessian(150, seed=bits)
    expected, _ = reference(weights, hessian, bits, 64)
    (solution,) = quantize_matrices([weights], ["x"], hessian, options(bits, 64))
    error, ideal_error = (
        quadratic_error(weights - decoded, hessian).sum() for decoded in (solution.weight.decode(), expected)
    )
    assert float(error / ideal_error) == pytest.approx(1, abs=0.02)
    # A float16 has eleven significant bits, and every level lies within 2^bits steps of the offset.
    steps = torch.cat([grid(group.double(), bits)[0].unsqueeze(1) for group in weights.split(64, dim=1)], dim=1)
    width = steps.repeat_interleave(64, dim=1)[:, :150]
    zeros = torch.cat([grid(group.double(), bits)[1].unsqueeze(1) for group in weights.split(64, dim=1)], dim=1)
    levels = solution.weight.decode().double() / width + zeros.repeat_interleave(64, dim=1)[:, :150]
    assert (levels - levels.round()).abs().max() < 2**bits * 2.0**-10
