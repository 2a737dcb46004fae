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
from shiftadd_cli.bcq.settle import settle

_BLOCK = 128


def compensated_sweep(
    weights: Tensor,
    objective: Objective,
    group_columns: int,
    levels: LevelTable | Callable[[int, Tensor], LevelTable],
) -> tuple[Tensor, Tensor]:
    """Quantize `weights` float32 `[out, in]`.

    levels: of all groups, batch shape `[C, out]`; or what gives those of one group, batch shape `[out]`, when the sweep
    reaches it, from its number and its current weights `[columns of the group, out]`. The order of the objective must
    then run through the groups one by one.

    Returns ranks uint8 `[in, out]` (transposed) and the values they stand for, float32 `[in, out]`.
    """
    order, factor = objective.order, objective.inverse_factor
    current = weights.T[order].contiguous()
    ranks = torch.empty_like(current, dtype=torch.uint8)
    values = torch.empty_like(current)
    groups = order // group_columns
    columns = len(groups)
    whole_groups = not isinstance(levels, LevelTable)
    for start, stop in _blocks(groups.tolist(), whole_groups):
        errors = torch.empty_like(current[start:stop])
        for first, last in _runs(groups, start, stop) if whole_groups else [(start, stop)]:
            here, part = slice(first, last), slice(first - start, last - start)
            if isinstance(levels, LevelTable):
                tables, of_column = levels, groups[here]
            else:
                tables, of_column = levels(int(groups[first]), current[here])[None], torch.zeros_like(groups[here])
            ranks[here], errors[part] = settle(
                current[here], factor[here, here], tables, of_column, values[here], descend=False
            )
            if last < stop:
                current[last:stop].addmm_(factor[here, last:stop].T, errors[part], alpha=-1)
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


def _runs(groups: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the runs of columns of one group."""
    for count in torch.unique_consecutive(groups[start:stop], return_counts=True)[1].tolist():
        yield start, start + count
        start += count
