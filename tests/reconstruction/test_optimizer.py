from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shiftadd_cli.reconstruction.optimizer import FactoredDescent, hold_back, rising_and_falling


def test_descent_finds_the_minimum_of_an_unevenly_scaled_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 7, generator=generator)
    curvature = torch.exp(3 * torch.randn(5, 1, generator=generator) + 2 * torch.randn(1, 7, generator=generator))
    matrix = nn.Parameter(torch.zeros(5, 7))
    optimizer = FactoredDescent([{"params": [matrix], "lr": 0.05}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 300)
    for _ in range(300):
        optimizer.zero_grad()
        (curvature * (matrix - target).square()).sum().backward()
        optimizer.step()
        schedule.step()
    assert (matrix - target).abs().max() < 0.05


def test_first_step_is_the_gradient_over_its_rank_one_root_mean_square() -> None:
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    matrix = nn.Parameter(torch.zeros(4, 6))
    matrix.grad = gradient.clone()
    FactoredDescent([{"params": [matrix], "lr": 0.5}]).step()
    square = gradient.double().square()
    root = (square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()).sqrt()
    torch.testing.assert_close(matrix.double(), -0.5 * gradient.double() / root, rtol=1e-4, atol=1e-6)


def test_loss_units_do_not_matter_and_zero_gradients_mean_no_step() -> None:
    steps = []
    for factor in (1.0, 1e-12):
        matrix, idle = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(2, 2))
        optimizer = FactoredDescent([{"params": [matrix, idle], "lr": 0.1}])
        matrix.grad = factor * torch.arange(9.0).view(3, 3)
        optimizer.step()
        assert torch.equal(idle, torch.ones(2, 2))
        steps.append(matrix.detach())
    torch.testing.assert_close(*steps)
    silent = nn.Parameter(torch.ones(3, 3))
    silent.grad = torch.zeros(3, 3)
    FactoredDescent([{"params": [silent], "lr": 0.1}]).step()
    assert torch.equal(silent, torch.ones(3, 3))


@given(st.integers(2, 500))
def test_batches_are_split_into_two_nonempty_sides(batches: int) -> None:
    train, held_back = hold_back(batches)
    assert train + held_back == list(range(batches))
    assert train
    assert held_back
    assert len(held_back) <= max(1, batches / 8)


@given(st.integers(1, 200))
def test_rates_rise_to_at_most_one_and_fall_to_almost_zero(steps: int) -> None:
    rate = rising_and_falling(steps)
    rates = [rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[-1] <= 1 / steps + 1e-12
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
