"""The values a weight of a group can take, and the nearest of them.

With planes b = 1 … q and scales α_b, a weight takes one of 2^q levels Σ ±α_b + offset. A *code* is the q sign bits as
an integer (bit b set: plane b is +1); a *rank* is the place of a level in ascending order. Sweeps work in ranks, since
nearest-level search needs only the midpoints of the sorted levels; codes are what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Up to this many levels, counting the midpoints below a weight beats a binary search per weight.
_COUNTING_LIMIT = 16


@cache
def code_signs(bits: int) -> Tensor:
    """Signs of every code: float32 `[2 ** bits, bits]` of ±1; bit b of the code is the sign of plane b."""
    codes = torch.arange(2**bits, device="cpu").unsqueeze(-1)
    return ((codes >> torch.arange(bits, device="cpu")) & 1).float() * 2 - 1


def sorted_levels(scales: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ascending levels of non-negative `scales` `[..., bits]` and `offsets` `[...]` or None, and the code of each
    (int64), both `[..., 2 ** bits]`."""
    levels = scales @ code_signs(scales.shape[-1]).to(scales).T
    if offsets is not None:
        levels = levels + offsets.unsqueeze(-1)
    # Stable: equal levels (a zero scale) keep the order of their codes, so results do not depend on the machine.
    ordered, codes = levels.sort(dim=-1, stable=True)
    return ordered, codes


@dataclass(frozen=True)
class LevelTable:
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


def ranks_within(values: Tensor, midpoints: Tensor) -> Tensor:
    """How many of the ascending `midpoints` `[..., L − 1]` lie below each of `values` `[..., n]`: int64 `[..., n]`, as
    `torch.searchsorted` gives them."""
    if midpoints.shape[-1] >= _COUNTING_LIMIT:
        return torch.searchsorted(midpoints.contiguous(), values.contiguous())
    # In bytes: four times as fast as a search of a few levels for each value.
    ranks = torch.zeros_like(values, dtype=torch.uint8)
    for midpoint in midpoints.split(1, dim=-1):
        ranks += values > midpoint
    return ranks.long()


def planes_of(codes: Tensor, bits: int) -> Tensor:
    """Planes of codes: uint8 `[out, in]` → bool `[out, bits, in]`."""
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device).view(1, bits, 1)
    return ((codes.unsqueeze(1) >> shifts) & 1).bool()
