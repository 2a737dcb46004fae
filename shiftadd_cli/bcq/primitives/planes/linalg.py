"""Solvers for small dense systems: in large batches, or one at a time in Python floats."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

# Lower limit of pivots, relative to the largest diagonal entry; it acts as a ridge on singular systems.
_LEAST_PIVOT = 1e-6


def solve_small(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve symmetric positive definite `matrix` `[..., n, n]` · x = `rhs` `[..., n]` for n up to about 10.

    LDLᵀ without pivoting, unrolled over n and vectorised over the batch: LAPACK spends more time on the call than on a
    3 × 3 system. Pivots are clamped to a millionth of the largest diagonal entry.
    """
    n = matrix.shape[-1]
    floor = matrix.diagonal(dim1=-2, dim2=-1).amax(-1) * _LEAST_PIVOT + torch.finfo(matrix.dtype).tiny
    rows = [[matrix[..., i, j] for j in range(i + 1)] for i in range(n)]
    return torch.stack(_ldl_solve(rows, rhs.unbind(-1), floor, torch.maximum), dim=-1)


def solve_floats(matrix: Sequence[Sequence[float]], rhs: Sequence[float]) -> list[float]:
    """`solve_small` for one system given row by row: even a single torch call would cost more than the arithmetic."""
    floor = max(row[i] for i, row in enumerate(matrix)) * _LEAST_PIVOT + sys.float_info.min
    return _ldl_solve(matrix, rhs, floor, max)


def _ldl_solve(
    matrix: Sequence[Sequence[Number]],
    rhs: Sequence[Number],
    floor: Number,
    larger: Callable[[Number, Number], Number],
) -> list[Number]:
    """Solve with the lower triangle of `matrix`, whose entries are single systems or batches of them."""
    n = len(rhs)
    lower: list[list[Number]] = [[] for _ in range(n)]
    pivots: list[Number] = []
    y: list[Number] = []
    for i in range(n):
        for j in range(i):
            value = matrix[i][j]
            for k in range(j):
                value = value - lower[i][k] * lower[j][k] * pivots[k]
            lower[i].append(value / pivots[j])
        pivot, forward = matrix[i][i], rhs[i]
        for k in range(i):
            pivot = pivot - lower[i][k] * lower[i][k] * pivots[k]
            forward = forward - lower[i][k] * y[k]
        pivots.append(larger(pivot, floor))
        y.append(forward)
    x = [y[i] / pivots[i] for i in range(n)]
    for i in reversed(range(n)):
        for k in range(i + 1, n):
            x[i] = x[i] - lower[k][i] * x[k]
    return x
