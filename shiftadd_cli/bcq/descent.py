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
from shiftadd_cli.bcq.settle import settle

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
    groups = torch.arange(columns, device=weights.device) // group_columns
    ranks = ranks.clone()
    values = values_of(tables, group_columns, ranks)
    for _ in range(passes):
        gradient = hessian @ (weights - values)
        changed = False
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            here = slice(start, stop)
            ranks[here], moved = settle(
                gradient[here], hessian[here, here], tables, groups[here], values[here], descend=True
            )
            if moved.any():
                changed = True
                if stop < columns:
                    gradient[stop:].addmm_(hessian[stop:, here], moved, alpha=-1)
        if not changed:
            break
    return ranks, values
