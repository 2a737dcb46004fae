from __future__ import annotations

import torch
from torch import nn

from shiftadd_cli.reconstruction.optimizer import FactoredDescent


def test_finds_the_minimum_of_a_quadratic_of_uneven_scales() -> None:
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


def test_the_first_step_is_the_gradient_over_its_rank_one_root_mean_square() -> None:
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    matrix = nn.Parameter(torch.zeros(4, 6))
    matrix.grad = gradient.clone()
    FactoredDescent([{"params": [matrix], "lr": 0.5}]).step()
    square = gradient.double().square()
    root = (square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()).sqrt()
    torch.testing.assert_close(matrix.double(), -0.5 * gradient.double() / root, rtol=1e-4, atol=1e-6)


def test_units_of_the_loss_do_not_matter_and_no_gradient_means_no_step() -> None:
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
