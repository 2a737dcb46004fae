"""Quantize columns one after another; each column corrects those that are still free.

The compensated sweep is that of GPTQ (arXiv:2210.17323, section 3.3, after Optimal Brain Surgeon) with binary-coded
levels in place of a uniform grid. Coordinate descent gives each weight the best level given all others. It minimises
tr[(W − Ŵ) H (W − Ŵ)ᵀ] exactly along one weight at a time, in all rows at once (the discrete step of LNQ in GuidedQuant,
arXiv:2505.07004, section 4, and of QuantEase). Both update a block of columns in one call of `settle`, and the rest of
the matrix with one matrix product per block. Matrices are transposed, `[in, out]`, so that a column is contiguous.

On a CPU the compiled kernels settle a block. Torch needs four small operations per column for it, a third of the time
of a solution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.levels import LevelTable, values_of
from shiftadd_cli.native.extension import cpu_extension

_BLOCK = 128


def compensated_sweep(
    weights: Tensor,
    objective: Objective,
    group_columns: int,
    levels: LevelTable | Callable[[int, Tensor], LevelTable],
) -> tuple[Tensor, Tensor]:
    """Quantize `weights` float32 `[out, in]`.

    levels: the levels of all groups, batch shape `[C, out]`; or a function that returns those of one group, batch shape
    `[out]`, from its number and its current weights `[columns of the group, out]` when the sweep reaches it. The order
    of the objective must then visit the groups one by one.

    Returns ranks uint8 `[in, out]` (transposed) and their values, float32 `[in, out]`.
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
                tables, entries = levels, groups[here]
            else:
                tables, entries = levels(int(groups[first]), current[here])[None], torch.zeros_like(groups[here])
            ranks[here], errors[part] = settle(
                current[here], factor[here, here], tables, entries, values[here], descend=False
            )
            if last < stop:
                current[last:stop].addmm_(factor[here, last:stop].T, errors[part], alpha=-1)
        if stop < columns:
            current[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(columns, device=order.device)
    return ranks[inverse], values[inverse]


def _blocks(groups: list[int], whole_groups: bool) -> Iterator[tuple[int, int]]:
    """Start and stop of blocks of about `_BLOCK` columns; with `whole_groups`, no block ends within a group."""
    start = 0
    while start < len(groups):
        stop = min(start + _BLOCK, len(groups))
        while whole_groups and stop < len(groups) and groups[stop] == groups[stop - 1]:
            stop += 1
        yield start, stop
        start = stop


def _runs(groups: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of columns from the same group."""
    for count in torch.unique_consecutive(groups[start:stop], return_counts=True)[1].tolist():
        yield start, start + count
        start += count


def descend_codes(
    weights: Tensor, hessian: Tensor, tables: LevelTable, group_columns: int, ranks: Tensor, passes: int
) -> tuple[Tensor, Tensor]:
    """Improve `ranks` by coordinate descent.

    weights: float32 `[in, out]` (transposed); hessian: float32 `[in, in]`, positive diagonal; tables: levels of batch
    shape `[groups, out]`; ranks: uint8 `[in, out]`, into the same tables.

    Returns new ranks uint8 `[in, out]` and their values, float32 `[in, out]`. The objective never exceeds that of the
    given ranks, up to rounding.
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


def settle(
    goals: Tensor,
    coupling: Tensor,
    tables: LevelTable,
    groups: Tensor,
    values: Tensor,
    *,
    descend: bool,
    kernels: str = "",
) -> tuple[Tensor, Tensor]:
    """Settle the columns of `goals` float32 `[n, out]` (transposed) in order. Column i takes the level nearest to its
    goal and moves the goals of each later column j by −coupling[i, j] times its step.

    In the sweep (`descend` false) goals are weights, and a step is (goal − level) / coupling[i, i]. In the descent they
    are gradients: the goal of column i is values[i] + goals[i] / coupling[i, i], and a step is the change in its value.

    coupling: float32 `[n, n]`, with any strides; tables: batch shape `[C, out]`; groups: int64 `[n]`, the entry
    of `tables` for each column; values: float32 `[n, out]`, set to the levels taken. The contents of `goals` are
    undefined afterwards. kernels: an instruction set, "" for the best, "torch" for torch.

    Returns the ranks of the levels, uint8 `[n, out]`, and the steps, float32 `[n, out]`.
    """
    extension = cpu_extension()
    if kernels == "torch" or extension is None or not goals.is_cpu:
        return _settle_by_torch(goals, coupling, tables, groups, values, descend)
    levels, midpoints = tables.levels.contiguous(), tables.midpoints.contiguous()
    if coupling.stride(1) != 1:
        coupling = coupling.contiguous()
    ranks, steps = torch.empty_like(goals, dtype=torch.uint8), torch.empty_like(goals)
    threads = torch.get_num_threads()
    extension.settle(descend, goals, coupling, levels, midpoints, groups, values, ranks, steps, kernels, threads)
    return ranks, steps


def _settle_by_torch(
    goals: Tensor, coupling: Tensor, tables: LevelTable, groups: Tensor, values: Tensor, descend: bool
) -> tuple[Tensor, Tensor]:
    ranks, steps = torch.empty_like(goals, dtype=torch.uint8), torch.empty_like(goals)
    diagonal, group_tables = coupling.diagonal(), {group: tables[group] for group in set(groups.tolist())}
    for i, group in enumerate(groups.tolist()):
        goal = torch.addcdiv(values[i], goals[i], diagonal[i]) if descend else goals[i]
        rank, value = group_tables[group].nearest(goal)
        if descend:
            torch.sub(value, values[i], out=steps[i])
        else:
            torch.div(goal - value, diagonal[i], out=steps[i])
        ranks[i], values[i] = rank, value
        if i + 1 < len(goals):
            goals[i + 1 :].addr_(coupling[i, i + 1 :], steps[i], alpha=-1)
    return ranks, steps
