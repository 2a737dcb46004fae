"""The error of a matrix, estimated from some of its rows: rows are quantized independently, and a few hundred tell.

Rows of the largest output are all taken: where a linear writes massive activations, a handful of rows carry nearly all
of its output, and their relative error is like no other's. The rest are taken evenly, and each stands for several.
Absolute errors are added up, since those of the rest are alike and relative ones are not.
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
    """`rows` `[n, in]` of a matrix; `factors` `[n]`, how many of its rows each stands for; `signal`, E‖W x‖² of the
    whole matrix over inputs of second moment `hessian` `[in, in]` (None: ‖W‖²)."""

    rows: Tensor
    factors: Tensor
    signal: float
    hessian: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor | None, *, whole: bool = False) -> RowSample:
        """Of a float32 `[out, in]` matrix; all of its rows if they are few, or if `whole`."""
        power = _powers(weight, hessian)
        signal = float(power.sum())
        if whole or len(weight) <= _LARGEST_ROWS + _OTHER_ROWS:
            return cls(weight, torch.ones_like(power), signal, hessian)
        order = power.argsort(descending=True, stable=True)
        largest, others = order[:_LARGEST_ROWS], order[_LARGEST_ROWS:].sort().values
        taken = others[torch.arange(_OTHER_ROWS, device=weight.device) * len(others) // _OTHER_ROWS]
        factors = torch.cat((power.new_ones(len(largest)), power.new_full((len(taken),), len(others) / len(taken))))
        return cls(weight[torch.cat((largest, taken))], factors, signal, hessian)

    def relative_error(self, solution: Solution) -> float:
        """E‖(W − Ŵ) x‖² / E‖W x‖² of the whole matrix, from what became of the rows."""
        errors = _powers(self.rows - solution.weight.decode(), self.hessian)
        return float((errors * self.factors).sum()) / self.signal if self.signal > 0 else 0.0


def _powers(rows: Tensor, hessian: Tensor | None) -> Tensor:
    """E[(w·x)²] of every row w."""
    return rows.square().sum(1) if hessian is None else ((rows @ hessian) * rows).sum(1)
