"""The levels that the weights of a group can take, and the search for the nearest level.

With planes b = 1 … q and scales α_b, a weight takes one of 2^q levels Σ ±α_b + offset. A *code* is the q sign bits as
an integer (bit b set: plane b is +1); a *rank* is the index of a level in ascending order. Sweeps work with ranks, as
nearest-level search needs only the midpoints of the sorted levels. Checkpoints store codes.

Functions on matrices of ranks, codes and values take them transposed, `[in, out]`, with tables of batch shape
`[C, out]`: one entry per group of columns and row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from shiftadd_cli.native.extension import cpu_extension

# Up to this many levels, counting the midpoints below a weight is faster than a binary search per weight.
_COUNTING_LIMIT = 16


@cache
def code_signs(bits: int) -> Tensor:
    """Signs of every code: float32 `[2 ** bits, bits]` of ±1; bit b of the code is the sign of plane b."""
    codes = torch.arange(2**bits, device="cpu").unsqueeze(-1)
    return ((codes >> torch.arange(bits, device="cpu")) & 1).float() * 2 - 1


def code_levels(scales: Tensor, offsets: Tensor | None) -> Tensor:
    """The level of every code, `[..., 2 ** bits]`, of `scales` `[..., bits]` and `offsets` `[...]` or None."""
    levels = scales @ code_signs(scales.shape[-1]).to(scales).T
    return levels if offsets is None else levels + offsets.unsqueeze(-1)


def sorted_levels(scales: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ascending levels of non-negative `scales` `[..., bits]` and `offsets` `[...]` or None, and the code of each
    (int64), both `[..., 2 ** bits]`."""
    levels = code_levels(scales, offsets)
    # A stable sort keeps equal levels (a zero scale) in the order of their codes, whatever the machine.
    ordered, codes = levels.sort(dim=-1, stable=True)
    return ordered, codes


class Levels(ABC):
    """The values that columns of a matrix can take, by group of columns."""

    @abstractmethod
    def settle(
        self, goals: Tensor, coupling: Tensor, groups: Tensor, values: Tensor, *, descend: bool, kernels: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Quantize the columns of `goals` float32 `[n, out]` (transposed) in order. Column i takes the values closest
        to its goal and moves the goals of each later column j by −coupling[i, j] times its step.

        In the sweep (`descend` false) goals are weights, and a step is (goal − value) / coupling[i, i]. In the descent
        they are gradients: the goal of column i is values[i] + goals[i] / coupling[i, i], and a step is the change in
        its value.

        coupling: float32 `[n, n]`, with any strides; groups: int64 `[n]`, the group of each column; values: float32
        `[n, out]`, overwritten by the new values; a descent starts from them. `goals` are undefined afterwards.
        kernels: an instruction set, "" for the best, "torch" for torch.

        Returns the codes of the values, uint8 `[n, out]`, and the steps, float32 `[n, out]`.
        """


@dataclass(frozen=True)
class LevelTable(Levels):
    """Sorted levels of a batch of groups, level axis first: `levels` `[L, ...]`, `midpoints` `[L − 1, ...]`, `codes`
    uint8 `[L, ...]` (the code of each rank)."""

    levels: Tensor
    midpoints: Tensor
    codes: Tensor

    @classmethod
    def build(cls, scales: Tensor, offsets: Tensor | None) -> LevelTable:
        """Levels of non-negative `scales` `[..., bits]` and `offsets` `[...]` or None."""
        levels, codes = sorted_levels(scales, offsets)
        ordered = levels.movedim(-1, 0).contiguous()
        return cls(ordered, (ordered[1:] + ordered[:-1]) / 2, codes.to(torch.uint8).movedim(-1, 0).contiguous())

    def __getitem__(self, index: object) -> LevelTable:
        """A part of the batch: the index applies to the axes after the level axis."""
        where = index if isinstance(index, tuple) else (index,)
        return LevelTable(*(part[(slice(None), *where)] for part in (self.levels, self.midpoints, self.codes)))

    def nearest(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rank (int64) and value of the nearest level of each weight; `weights` has the batch shape of the table."""
        if len(self.levels) <= _COUNTING_LIMIT:
            rank = (weights > self.midpoints).sum(0)
        else:
            midpoints = self.midpoints.movedim(0, -1).contiguous()
            rank = torch.searchsorted(midpoints, weights.unsqueeze(-1)).squeeze(-1)
        return rank, self.levels.gather(0, rank.unsqueeze(0)).squeeze(0)

    def settle(
        self, goals: Tensor, coupling: Tensor, groups: Tensor, values: Tensor, *, descend: bool, kernels: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Every weight takes its nearest level; codes are ranks. The batch shape of the table is `[C, out]`."""
        extension = cpu_extension()
        ranks, steps = torch.empty_like(goals, dtype=torch.uint8), torch.empty_like(goals)
        if kernels == "torch" or extension is None or not goals.is_cpu:
            # Four small operations per column take a third of the time of a solution.
            diagonal, tables = coupling.diagonal(), {group: self[group] for group in set(groups.tolist())}
            for i, group in enumerate(groups.tolist()):
                goal = torch.addcdiv(values[i], goals[i], diagonal[i]) if descend else goals[i]
                ranks[i], value = tables[group].nearest(goal)
                settle_column(i, goals, goal, coupling, value, values, steps, descend=descend)
            return ranks, steps
        levels, midpoints = self.levels.contiguous(), self.midpoints.contiguous()
        if coupling.stride(1) != 1:
            coupling = coupling.contiguous()
        threads = torch.get_num_threads()
        extension.settle(descend, goals, coupling, levels, midpoints, groups, values, ranks, steps, kernels, threads)
        return ranks, steps


def settle_column(
    column: int,
    goals: Tensor,
    goal: Tensor,
    coupling: Tensor,
    value: Tensor,
    values: Tensor,
    steps: Tensor,
    *,
    descend: bool,
) -> None:
    """Part of `Levels.settle`: a column whose goal was `goal` `[out]` takes `value` `[out]`."""
    if descend:
        torch.sub(value, values[column], out=steps[column])
    else:
        torch.div(goal - value, coupling[column, column], out=steps[column])
    values[column] = value
    if column + 1 < len(goals):
        goals[column + 1 :].addr_(coupling[column, column + 1 :], steps[column], alpha=-1)


def ranks_within(values: Tensor, midpoints: Tensor) -> Tensor:
    """The number of ascending `midpoints` `[..., L − 1]` below each of `values` `[..., n]`: int64 `[..., n]`, as
    returned by `torch.searchsorted`."""
    if midpoints.shape[-1] >= _COUNTING_LIMIT:
        return torch.searchsorted(midpoints.contiguous(), values.contiguous())
    # Counting in bytes is four times as fast as a search among a few levels for each value.
    ranks = torch.zeros_like(values, dtype=torch.uint8)
    for midpoint in midpoints.split(1, dim=-1):
        ranks += values > midpoint
    return ranks.long()


def planes_of(codes: Tensor, bits: int) -> Tensor:
    """The planes of codes: uint8 `[out, in]` → bool `[out, bits, in]`."""
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device).view(1, bits, 1)
    return ((codes.unsqueeze(1) >> shifts) & 1).bool()


def _group(group: int, group_columns: int) -> slice:
    return slice(group * group_columns, (group + 1) * group_columns)


def nearest_ranks(weights: Tensor, tables: LevelTable, group_columns: int) -> tuple[Tensor, Tensor]:
    """The nearest level of every weight float32 `[in, out]`: ranks uint8 and values float32, `[in, out]`."""
    ranks = torch.zeros_like(weights, dtype=torch.uint8)
    for group in range(tables.levels.shape[1]):
        where = _group(group, group_columns)
        for midpoint in tables.midpoints[:, group]:
            ranks[where] += weights[where] > midpoint
    return ranks, values_of(tables, group_columns, ranks)


def values_of(tables: LevelTable, group_columns: int, ranks: Tensor) -> Tensor:
    """The values float32 `[in, out]` of ranks uint8 `[in, out]`."""
    out = torch.empty(ranks.shape, dtype=tables.levels.dtype, device=ranks.device)
    for group in range(tables.levels.shape[1]):
        where = _group(group, group_columns)
        out[where] = tables.levels[:, group].gather(0, ranks[where].long())
    return out


def codes_of(tables: LevelTable, group_columns: int, ranks: Tensor) -> Tensor:
    """The codes uint8 `[in, out]` of ranks uint8 `[in, out]`."""
    out = torch.empty_like(ranks)
    for group in range(tables.codes.shape[1]):
        where = _group(group, group_columns)
        out[where] = tables.codes[:, group].gather(0, ranks[where].long())
    return out


def ranks_of(tables: LevelTable, group_columns: int, codes: Tensor) -> Tensor:
    """The ranks uint8 `[in, out]` of codes uint8 `[in, out]`."""
    rank_of_code = tables.codes.long().argsort(dim=0).to(torch.uint8)
    out = torch.empty_like(codes)
    for group in range(tables.codes.shape[1]):
        where = _group(group, group_columns)
        out[where] = rank_of_code[:, group].gather(0, codes[where].long())
    return out


def flip_negative(
    codes: Tensor, scales: Tensor, curvature: Tensor, group_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Make scales positive by inverting the planes of the negative ones; the values stay the same.

    codes: uint8 `[in, out]`; scales: `[out, C, bits]`; curvature: `[out, C, terms, terms]`, whose rows and columns
    change sign with their plane.
    """
    bits = scales.shape[-1]
    negative = scales < 0
    weights_of_bits = 1 << torch.arange(bits, device=scales.device)
    mask = (negative * weights_of_bits).sum(-1).to(torch.uint8)
    per_column = mask.T.repeat_interleave(group_columns, dim=0)[: codes.shape[0]]
    sign = torch.ones(curvature.shape[:-1], device=scales.device)
    sign[..., :bits] = torch.where(negative, -1.0, 1.0)
    return codes ^ per_column, scales.abs(), curvature * sign.unsqueeze(-1) * sign.unsqueeze(-2)
