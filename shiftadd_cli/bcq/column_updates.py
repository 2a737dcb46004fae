"""Quantize columns one after another; each column corrects those that are still free.

The compensated sweep is that of GPTQ (arXiv:2210.17323, section 3.3, after Optimal Brain Surgeon) with binary-coded
levels in place of a uniform grid. Coordinate descent gives each weight the best level given all others. It minimises
tr[(W − Ŵ) H (W − Ŵ)ᵀ] exactly along one column at a time (the discrete step of LNQ in GuidedQuant, arXiv:2505.07004,
section 4, and of QuantEase). Both update a block of columns in one call of `Levels.settle`, and the rest of the matrix
with one matrix product per block. Matrices are transposed, `[in, out]`, so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.levels import Levels

_BLOCK = 128


def compensated_sweep(
    weights: Tensor,
    objective: Objective,
    group_columns: int,
    levels: Levels | Callable[[int, Tensor], Levels],
) -> tuple[Tensor, Tensor]:
    """Quantize `weights` float32 `[out, in]`.

    levels: the levels of all groups; or a function that returns those of a single group from its number and its current
    weights `[columns of the group, out]` when the sweep reaches it. The order of the objective must then visit the
    groups one by one.

    Returns codes uint8 `[in, out]` (transposed), as `levels` defines them, and their values, float32 `[in, out]`.
    """
    order, factor = objective.order, objective.inverse_factor
    current = weights.T[order].contiguous()
    codes = torch.empty_like(current, dtype=torch.uint8)
    values = torch.empty_like(current)
    groups = order // group_columns
    columns = len(groups)
    whole_groups = not isinstance(levels, Levels)
    for start, stop in _blocks(groups.tolist(), whole_groups):
        errors = torch.empty_like(current[start:stop])
        for first, last in _runs(groups, start, stop) if whole_groups else [(start, stop)]:
            here, part = slice(first, last), slice(first - start, last - start)
            if isinstance(levels, Levels):
                present, entries = levels, groups[here]
            else:
                present, entries = levels(int(groups[first]), current[here]), torch.zeros_like(groups[here])
            codes[here], errors[part] = present.settle(
                current[here], factor[here, here], entries, values[here], descend=False
            )
            if last < stop:
                current[last:stop].addmm_(factor[here, last:stop].T, errors[part], alpha=-1)
        if stop < columns:
            current[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(columns, device=order.device)
    return codes[inverse], values[inverse]


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
    weights: Tensor, hessian: Tensor, levels: Levels, group_columns: int, values: Tensor, passes: int
) -> tuple[Tensor, Tensor]:
    """Improve `values` by coordinate descent.

    weights: float32 `[in, out]` (transposed); hessian: float32 `[in, in]`, positive diagonal; levels: those of all
    groups; values: float32 `[in, out]`, which `levels` can take.

    Returns codes uint8 `[in, out]` and their values, float32 `[in, out]`. The objective never exceeds that of the given
    values, up to rounding.
    """
    columns = weights.shape[0]
    groups = torch.arange(columns, device=weights.device) // group_columns
    codes, values = torch.empty_like(weights, dtype=torch.uint8), values.clone()
    for _ in range(passes):
        gradient = hessian @ (weights - values)
        changed = False
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            here = slice(start, stop)
            codes[here], moved = levels.settle(
                gradient[here], hessian[here, here], groups[here], values[here], descend=True
            )
            if moved.any():
                changed = True
                if stop < columns:
                    gradient[stop:].addmm_(hessian[stop:, here], moved, alpha=-1)
        if not changed:
            break
    return codes, values
