"""Coordinate descent on the codes: each weight in turn takes the level that is best given all the others.

Minimises tr[(W − Ŵ) H (W − Ŵ)ᵀ] exactly along one weight at a time, all rows at once (the discrete step of LNQ,
GuidedQuant section 4, and of QuantEase). The gradient is refreshed inside a block of columns by rank-one updates and
outside it by one matrix product per block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import LevelTable
from shiftadd_cli.bcq.ranks import values_of

_BLOCK = 128


def descend_codes(
    weights: Tensor, hessian: Tensor, tables: LevelTable, group_columns: int, ranks: Tensor, passes: int
) -> tuple[Tensor, Tensor]:
    """Improve `ranks`.

    weights: float32 `[in, out]` (transposed); hessian: float32 `[in, in]`, positive diagonal; tables: levels of batch
    shape `[groups, out]`; ranks: uint8 `[in, out]`, of the same tables.

    Returns new ranks uint8 `[in, out]` and the values they stand for, float32 `[in, out]`. The objective never rises
    from that of the given ranks, up to rounding.
    """
    columns = weights.shape[0]
    groups = [tables[group] for group in range(-(-columns // group_columns))]
    ranks = ranks.clone()
    values = values_of(tables, group_columns, ranks)
    diagonal = hessian.diagonal()
    for _ in range(passes):
        gradient = hessian @ (weights - values)
        changed = False
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            local, old = gradient[start:stop], values[start:stop].clone()
            inner = hessian[start:stop, start:stop]
            for i in range(stop - start):
                column = start + i
                goal = torch.addcdiv(values[column], local[i], diagonal[column])
                rank, value = groups[column // group_columns].nearest(goal)
                step = value - values[column]
                ranks[column] = rank
                values[column] = value
                if i + 1 < stop - start:
                    local[i + 1 :].addr_(inner[i + 1 :, i], step, alpha=-1)
            moved = values[start:stop] - old
            if moved.any():
                changed = True
                if stop < columns:
                    gradient[stop:].addmm_(hessian[stop:, start:stop], moved, alpha=-1)
        if not changed:
            break
    return ranks, values
