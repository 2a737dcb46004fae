"""The compensated sweep: quantize column by column, pushing each column's error onto the columns still free.

The update is that of GPTQ (section 3.3, after Optimal Brain Surgeon) with binary-coded levels in place of a uniform grid.
Matrices are held transposed, `[in, out]`, so that the column in hand is contiguous. Updates reach the rest of the matrix
once per block of columns, as one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.levels import LevelTable

_BLOCK = 128


def compensated_sweep(
    weights: Tensor,
    objective: Objective,
    group_columns: int,
    levels: Callable[[int, Tensor], LevelTable],
) -> tuple[Tensor, Tensor]:
    """Quantize `weights` float32 `[out, in]`.

    levels: called with a group of columns and its current weights `[columns of the group, out]` when the sweep reaches
    the group's first column in a block; gives the levels of that group, batch shape `[out]`.

    Returns ranks uint8 `[in, out]` (transposed) and the values they stand for, float32 `[in, out]`.
    """
    if objective.inverse_factor is None:
        raise ValueError("the sweep needs the inverse factor of the Hessian")
    order, factor = objective.order, objective.inverse_factor
    current = weights.T[order].contiguous()
    ranks = torch.empty_like(current, dtype=torch.uint8)
    values = torch.empty_like(current)
    groups = (order // group_columns).tolist()
    columns = len(groups)
    # A group fitted on arrival must lie in one block: only there are its columns up to date.
    width = max(1, _BLOCK // group_columns) * group_columns if group_columns < _BLOCK else group_columns
    width = width if group_columns != columns else max(columns, 1)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block, upper = current[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        tables: dict[int, LevelTable] = {}
        for i in range(stop - start):
            group = groups[start + i]
            if group not in tables:
                members = [j for j in range(i, stop - start) if groups[start + j] == group]
                tables[group] = levels(group, block[members])
            rank, value = tables[group].nearest(block[i])
            ranks[start + i] = rank
            values[start + i] = value
            torch.div(block[i] - value, upper[i, i], out=errors[i])
            if i + 1 < stop - start:
                block[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        if stop < columns:
            current[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(columns, device=order.device)
    return ranks[inverse], values[inverse]
