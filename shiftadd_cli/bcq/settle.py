"""Columns that settle on levels one after the other, each correcting those after it: what the compensated sweep and
coordinate descent have in common.

On a CPU the compiled kernels do it, which take all columns of a block in one call; the same in torch takes four small
operations for each column, a third of the time of a solution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import LevelTable
from shiftadd_cli.runtime.kernels.extension import cpu_extension


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
    """Settle the columns of `goals` float32 `[n, out]` (transposed) in order. Every one takes the nearest level to its
    goal and moves the goals of each later one, j, by −coupling[i, j] times its step.

    In the sweep (`descend` false) goals are weights, and a step is (goal − level) / coupling[i, i]. In the descent they
    are gradients, and column i wants values[i] + goals[i] / coupling[i, i]; a step is what its value changes by.

    coupling: float32 `[n, n]`, of any strides; tables: batch shape `[C, out]`; groups: int64 `[n]`, the entry
    of `tables` of each column; values: float32 `[n, out]`, set to the levels taken. What `goals` holds afterwards is
    undefined. kernels: an instruction set, "" for the best, "torch" for torch.

    Returns the ranks of the levels, uint8 `[n, out]`, and the steps, float32 `[n, out]`.
    """
    extension = cpu_extension()
    if kernels == "torch" or extension is None or not goals.is_cpu:
        return _settle_by_torch(goals, coupling, tables, groups, values, descend)
    columns, rows = goals.shape
    levels, midpoints = tables.levels.contiguous(), tables.midpoints.contiguous()
    if coupling.stride(1) != 1:
        coupling = coupling.contiguous()
    # Addresses are passed on unseen, so a tensor of another size, dtype or order must not get there.
    right = (
        all(each.dtype == torch.float32 for each in (goals, coupling, levels, midpoints, values))
        and all(each.is_contiguous() for each in (goals, values, groups))
        and values.shape == goals.shape
        and coupling.shape == (columns, columns)
        and groups.shape == (columns,)
        and groups.dtype == torch.int64
        and levels.shape[2] == rows
        and midpoints.shape == (len(levels) - 1, *levels.shape[1:])
    )
    if not right:
        raise ValueError(f"The tensors do not fit goals of {list(goals.shape)}.")
    ranks, steps = torch.empty_like(goals, dtype=torch.uint8), torch.empty_like(goals)
    extension.settle(
        descend,
        columns,
        rows,
        goals.data_ptr(),
        coupling.data_ptr(),
        coupling.stride(0),
        levels.data_ptr(),
        midpoints.data_ptr(),
        len(levels),
        levels.shape[1],
        groups.data_ptr(),
        values.data_ptr(),
        ranks.data_ptr(),
        steps.data_ptr(),
        kernels,
        torch.get_num_threads(),
    )
    return ranks, steps


def _settle_by_torch(
    goals: Tensor, coupling: Tensor, tables: LevelTable, groups: Tensor, values: Tensor, descend: bool
) -> tuple[Tensor, Tensor]:
    ranks, steps = torch.empty_like(goals, dtype=torch.uint8), torch.empty_like(goals)
    diagonal, of_group = coupling.diagonal(), {group: tables[group] for group in set(groups.tolist())}
    for i, group in enumerate(groups.tolist()):
        goal = torch.addcdiv(values[i], goals[i], diagonal[i]) if descend else goals[i]
        rank, value = of_group[group].nearest(goal)
        if descend:
            torch.sub(value, values[i], out=steps[i])
        else:
            torch.div(goal - value, diagonal[i], out=steps[i])
        ranks[i], values[i] = rank, value
        if i + 1 < len(goals):
            goals[i + 1 :].addr_(coupling[i, i + 1 :], steps[i], alpha=-1)
    return ranks, steps
