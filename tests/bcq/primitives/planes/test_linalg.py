from __future__ import annotations

import pytest
import torch
from bcq_problems import generator, random_spd

from shiftadd_cli.bcq.primitives.planes.linalg import solve_floats, solve_small


@pytest.mark.parametrize("n", range(1, 11))
def test_solutions_agree_with_float64(n: int) -> None:
    matrix = random_spd(n, seed=n, batch=(50,)) + 0.1 * torch.eye(n)
    rhs = torch.randn(50, n, generator=generator(n))
    expected = torch.linalg.solve(matrix.double(), rhs.double())
    residual = (matrix.double() @ solve_small(matrix, rhs).double().unsqueeze(-1)).squeeze(-1) - rhs
    assert residual.abs().max() < 1e-3
    torch.testing.assert_close(solve_small(matrix.double(), rhs.double()), expected)


def test_two_equal_planes_share_the_solution() -> None:
    basis = torch.randn(30, 1, 64, generator=generator(0)).sign().expand(-1, 2, -1)
    weights = torch.randn(30, 64, generator=generator(1))
    solution = solve_small(basis @ basis.mT, (basis @ weights.unsqueeze(-1)).squeeze(-1))
    assert torch.isfinite(solution).all()
    alone = (basis[:, 0] * weights).mean(-1)
    torch.testing.assert_close(solution.sum(-1), alone, rtol=1e-4, atol=1e-5)


def test_a_zero_system_gives_zero() -> None:
    assert torch.equal(solve_small(torch.zeros(3, 4, 4), torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("n", range(1, 11))
def test_one_system_in_floats_is_a_batch_of_one(n: int) -> None:
    matrix, rhs = random_spd(n, seed=n).double(), torch.randn(n, generator=generator(n)).double()
    expected = solve_small(matrix, rhs)
    torch.testing.assert_close(torch.tensor(solve_floats(matrix.tolist(), rhs.tolist()), dtype=torch.float64), expected)
    # Singular: all rows are equal.
    flat = solve_small(torch.ones(n, n).double(), torch.ones(n).double())
    solution = solve_floats([[1.0] * n] * n, [1.0] * n)
    torch.testing.assert_close(torch.tensor(solution, dtype=torch.float64), flat)


def test_a_zero_system_in_floats_gives_zero() -> None:
    assert solve_floats([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]) == [0.0, 0.0]
