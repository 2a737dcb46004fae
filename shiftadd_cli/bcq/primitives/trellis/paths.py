"""Columns that take the best path through a trellis, in place of the nearest level for each weight.

With all other columns fixed, the objective tr[(W − Ŵ) H (W − Ŵ)ᵀ] of a column c is H_cc · Σ_rows (goal − level)²: every
row counts the same. So the path that the Viterbi algorithm finds is exactly the best for the column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import Levels, settle_column
from shiftadd_cli.bcq.primitives.trellis.code import TrellisCode
from shiftadd_cli.native.extension import cpu_extension

# Columns that take their paths in one call where no column corrects another.
_BLOCK = 64


@dataclass(frozen=True)
class BestPaths(Levels):
    """The levels of a trellis code for all groups and rows.

    Attributes:
        code: the code.
        stripe: rows of a path.
        levels: float32 `[C, out, 2^m]`, in the order of the code's labels.
    """

    code: TrellisCode
    stripe: int
    levels: Tensor

    def closest(self, columns: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The best path of every column by itself: stored bits uint8 and values float32 `[n, out]` for `columns`
        float32 `[n, out]`, where `groups` int64 `[n]` has the group of each."""
        codes, values = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
        for start in range(0, len(columns), _BLOCK):
            part = slice(start, start + _BLOCK)
            goals, alone = columns[part].clone(), torch.eye(len(groups[part]), device=columns.device)
            codes[part], _ = self.settle(goals, alone, groups[part], values[part], descend=False)
        return codes, values

    def settle(
        self, goals: Tensor, coupling: Tensor, groups: Tensor, values: Tensor, *, descend: bool, kernels: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Every column takes the path with the least squared error; codes are the stored bits."""
        stored, steps = torch.empty_like(goals, dtype=torch.uint8), torch.empty_like(goals)
        extension = cpu_extension()
        if kernels == "torch" or extension is None or not self.code.has_kernel:
            for i, group in enumerate(groups.tolist()):
                goal = torch.addcdiv(values[i], goals[i], coupling[i, i]) if descend else goals[i]
                stored[i], value = self.code.encode(goal, self.levels[group], self.stripe)
                settle_column(i, goals, goal, coupling, value, values, steps, descend=descend)
            return stored, steps
        # Torch takes a small operation per row of every column, so a GPU is left for the compiled kernels of the CPU.
        local = [tensor.cpu().contiguous() for tensor in (goals, coupling, self.levels, groups, values, stored, steps)]
        present, form, levels, columns, taken, codes, moved = local
        masks, threads = list(self.code.masks), torch.get_num_threads()
        extension.settle_paths(
            descend, present, form, levels, self.code.bits, masks, self.stripe, columns, taken, codes, moved, kernels,
            threads,
        )  # fmt: skip
        for target, source in ((values, taken), (stored, codes), (steps, moved)):
            if target is not source:
                target.copy_(source)
        return stored, steps
