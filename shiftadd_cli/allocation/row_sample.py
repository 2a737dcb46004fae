"""The error of a matrix, estimated from a few hundred of its rows, since rows are quantized independently.

The rows with the largest output are always included: in a linear that writes massive activations, a handful of rows
carry nearly all of the output, and their relative errors are unlike those of other rows. The rest are sampled evenly,
and each represents several rows. Absolute errors are summed, since they are similar among these rows and relative
errors are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.bcq.solver import Solution

_LARGEST_ROWS = 32
_OTHER_ROWS = 224


@dataclass(frozen=True)
class RowSample:
    """`rows` `[n, in]` of a matrix; `factors` `[n]`, how many of its rows each represents; `signal`, E‖W x‖² of the
    whole matrix over inputs of second moment `hessian` `[in, in]` (None: ‖W‖²)."""

    rows: Tensor
    factors: Tensor
    signal: float
    hessian: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor | None, *, whole: bool = False) -> RowSample:
        """A sample of a float32 `[out, in]` matrix; all of its rows if there are few, or if `whole`."""
        power = _powers(weight, hessian)
        signal = float(power.sum())
        if whole or len(weight) <= _LARGEST_ROWS + _OTHER_ROWS:
            return cls(weight, torch.ones_like(power), signal, hessian)
        order = power.argsort(descending=True, stable=True)
        largest, others = order[:_LARGEST_ROWS], order[_LARGEST_ROWS:].sort().values
        sampled = others[torch.arange(_OTHER_ROWS, device=weight.device) * len(others) // _OTHER_ROWS]
        factors = torch.cat((power.new_ones(len(largest)), power.new_full((len(sampled),), len(others) / len(sampled))))
        return cls(weight[torch.cat((largest, sampled))], factors, signal, hessian)

    def relative_error(self, solution: Solution) -> float:
        """E‖(W − Ŵ) x‖² / E‖W x‖² of the whole matrix, estimated from the solution of the sampled rows."""
        errors = _powers(self.rows - solution.weight.decode(), self.hessian)
        return float((errors * self.factors).sum()) / self.signal if self.signal > 0 else 0.0


def _powers(rows: Tensor, hessian: Tensor | None) -> Tensor:
    """E[(w·x)²] of every row w."""
    return rows.square().sum(1) if hessian is None else ((rows @ hessian) * rows).sum(1)
