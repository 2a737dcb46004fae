from __future__ import annotations

import math

import pytest
import torch
from bcq_problems import generator

from shiftadd_cli.bcq.levels import LevelTable
from shiftadd_cli.bcq.primitives.planes.initial_scales import Scales, clipped_starts, greedy_start, uniform_grid


def nearest_values(fit: Scales, weights: torch.Tensor) -> torch.Tensor:
    table = LevelTable.build(fit.scales, fit.offsets)
    columns = [table.nearest(column)[1] for column in weights.T.contiguous()]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("offset", [False, True])
def test_the_uniform_grid_is_round_to_nearest(bits: int, offset: bool) -> None:
    weights = torch.randn(30, 64, generator=generator(bits)) + 0.3
    fit = uniform_grid(weights, torch.ones_like(weights), bits, offset, math.inf)
    values = nearest_values(fit, weights)
    top = 2**bits - 1
    for row, value in zip(weights.double(), values.double(), strict=True):
        if offset:
            low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
            step = (high - low) / top
            zero = round(-low / step)
            plain = ((row / step).round() + zero).clamp(0, top).sub(zero) * step
        else:
            step = 2 * float(row.abs().max()) / top
            # Levels are odd multiples of half a step.
            plain = ((row / step - 0.5).round() + 0.5).clamp(-top / 2, top / 2) * step
        # On a tie either neighbour is nearest.
        assert ((value - row).abs() - (plain - row).abs()).abs().max() < 1e-5
        assert ((value - plain).abs() > 1e-5).sum() <= 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_uniform_grid_within_a_limit_covers_the_range(bits: int) -> None:
    limit = 0.875
    weights = torch.randn(50, 64, generator=generator(bits)) + torch.linspace(-5, 5, 50).view(-1, 1)
    fit = uniform_grid(weights, torch.ones_like(weights), bits, True, limit)
    assert fit.offsets is not None
    assert (fit.offsets.abs() <= limit * fit.scales.amax(-1) * (1 + 1e-5)).all()
    step = 2 * fit.scales[:, 0]
    error = (nearest_values(fit, weights) - weights).abs().amax(-1)
    # Half a step inside the range; rounding the zero point can leave the ends out by another half.
    assert (error <= step * (1 + 1e-4)).all()


def test_the_greedy_start_matches_a_computation_by_hand() -> None:
    weights = torch.tensor([[4.0, -2.0, 1.0, 1.0]])
    fit = greedy_start(weights, torch.tensor([[1.0, 1.0, 1.0, 1.0]]), 2)
    # Mean |w| = 2 leaves residuals 2, 0, −1, −1, whose mean size is 1.
    assert fit.scales.tolist() == [[2.0, 1.0]]
    weighted = greedy_start(weights, torch.tensor([[3.0, 1.0, 0.0, 0.0]]), 1)
    assert weighted.scales.tolist() == [[3.5]]


@pytest.mark.parametrize("offset", [False, True])
def test_weights_without_importance_have_no_influence(offset: bool) -> None:
    weights = 2 + torch.rand(8, 10, generator=generator(0))
    h = torch.rand(8, 10, generator=generator(1)) + 0.1
    stray = torch.cat((weights, torch.zeros(8, 1), 100 * torch.ones(8, 1)), dim=1)
    padded = torch.nn.functional.pad(h, (0, 2))
    pairs = [
        (greedy_start(weights, h, 3), greedy_start(stray, padded, 3)),
        (uniform_grid(weights, h, 3, offset, 0.875), uniform_grid(stray, padded, 3, offset, 0.875)),
        *zip(clipped_starts(weights, h, 3, offset), clipped_starts(stray, padded, 3, offset), strict=True),
    ]
    for alone, beside in pairs:
        torch.testing.assert_close(alone.scales, beside.scales)
        assert (alone.offsets is None) == (beside.offsets is None)
        if alone.offsets is not None and beside.offsets is not None:
            torch.testing.assert_close(alone.offsets, beside.offsets)


@pytest.mark.parametrize("offset", [False, True])
def test_zero_weights_give_zero_scales(offset: bool) -> None:
    nothing = torch.zeros(2, 5)
    for h in (nothing, torch.ones(2, 5)):
        fits = [greedy_start(nothing, h, 3), uniform_grid(nothing, h, 3, offset, 0.875)]
        for fit in [*fits, *clipped_starts(nothing, h, 3, offset)]:
            assert not fit.scales.any()
            assert fit.offsets is None or not fit.offsets.any()
