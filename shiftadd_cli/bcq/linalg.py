"""Small dense systems in large batches."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_small(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve symmetric positive definite `matrix` `[..., n, n]` · x = `rhs` `[..., n]` for n up to about 10.

    LDLᵀ without pivoting, unrolled over n and vectorised over the batch: LAPACK spends more time on the call than on a
    3 × 3 system. Pivots are kept above a millionth of the diagonal, which acts as a ridge on singular systems.
    """
    n = matrix.shape[-1]
    floor = matrix.diagonal(dim1=-2, dim2=-1).amax(-1) * 1e-6 + torch.finfo(matrix.dtype).tiny
    lower: list[list[Tensor]] = [[] for _ in range(n)]
    pivots: list[Tensor] = []
    y: list[Tensor] = []
    for i in range(n):
        for j in range(i):
            value = matrix[..., i, j]
            for k in range(j):
                value = value - lower[i][k] * lower[j][k] * pivots[k]
            lower[i].append(value / pivots[j])
        pivot, forward = matrix[..., i, i], rhs[..., i]
        for k in range(i):
            pivot = pivot - lower[i][k].square() * pivots[k]
            forward = forward - lower[i][k] * y[k]
        pivots.append(torch.maximum(pivot, floor))
        y.append(forward)
    x: list[Tensor] = [y[i] / pivots[i] for i in range(n)]
    for i in reversed(range(n)):
        for k in range(i + 1, n):
            x[i] = x[i] - lower[k][i] * x[k]
    return torch.stack(x, dim=-1)
