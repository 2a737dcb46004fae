"""The compensated sweep: quantize column by column, pushing each column's error onto the columns still free.

The update is that of GPTQ (section 3.3, after Optimal Brain Surgeon) with binary-coded levels in place of a uniform
grid. Matrices are held transposed, `[in, out]`, so that the column in hand is contiguous. Updates reach the rest of the
matrix once per block of columns, as one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    *,
    whole_groups: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantize `weights` float32 `[out, in]`.

    levels: called with a group of columns and its current weights `[columns of the group, out]` when the sweep reaches
    the group's first column in a block; gives the levels of that group, batch shape `[out]`.
    whole_groups: keep every group in one block, where its columns are up to date when `levels` sees them and it is
    called once per group; the order of the objective must then run through the groups one by one.

    Returns ranks uint8 `[in, out]` (transposed) and the values they stand for, float32 `[in, out]`.
    """
    order, factor = objective.order, objective.inverse_factor
    current = weights.T[order].contiguous()
    ranks = torch.empty_like(current, dtype=torch.uint8)
    values = torch.empty_like(current)
    groups = (order // group_columns).tolist()
    columns = len(groups)
    for start, stop in _blocks(groups, whole_groups):
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


def _blocks(groups: list[int], whole_groups: bool) -> Iterator[tuple[int, int]]:
    """Start and stop of blocks of about `_BLOCK` columns; with `whole_groups` they only end where a group ends."""
    start = 0
    while start < len(groups):
        stop = min(start + _BLOCK, len(groups))
        while whole_groups and stop < len(groups) and groups[stop] == groups[stop - 1]:
            stop += 1
        yield start, stop
        start = stop
